"""Choices of the defaults: made on training donors alone, each training once, told in one table."""

from __future__ import annotations

import json
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from benchmarks import choices, choices_table, results
from benchmarks.__main__ import main
from benchmarks.arms import ARMS
from benchmarks.cells import Cells, Training
from benchmarks.choices import CHOICES, Train, choose
from benchmarks.evaluation import prepare
from benchmarks.results import Part
from benchmarks.rivals import cfgen
from benchmarks.run import plan
from benchmarks.settings import Settings
from benchmarks.splits import inner_splits, make_splits
from benchmarks.summary import gains
from cfgen_augment import CFGen, model
from cfgen_augment.flow import NULL

THIN = {"rare": 6}


def donor_cells(seed=0, n_donors=7, n_genes=20):
    """Three types with markers of their own, 40 cells in every donor."""
    random = np.random.default_rng(seed)
    labels = np.array(["common"] * 22 + ["middle"] * 12 + ["rare"] * 6)
    rates = np.full((40, n_genes), 1.0)
    for i, name in enumerate(["common", "middle", "rare"]):
        rates[labels == name, 4 * i : 4 * i + 4] = 4.0
    counts = np.concatenate([random.poisson(rates) for _ in range(n_donors)])
    return Cells(
        sparse.csr_matrix(counts.astype(np.float32)),
        np.tile(labels, n_donors),
        np.array([f"g{i}" for i in range(n_genes)]),
        donors=np.repeat([f"donor{i}" for i in range(n_donors)], 40),
    )


@pytest.fixture
def quick(monkeypatch):
    """Trainings of one minibatch."""
    monkeypatch.setattr(model, "_AUTO_EPOCHS", ((1, 1, 1, 1), (1, 1, 1, 1)))


@pytest.fixture
def trainings(monkeypatch):
    """Every model that is trained, as it is fitted."""
    fitted = []
    fit = CFGen.fit

    def recorded(self, *arguments, **options):
        fitted.append(self)
        return fit(self, *arguments, **options)

    monkeypatch.setattr(CFGen, "fit", recorded)
    return fitted


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A small comparison, on a file as a user would have it."""
    cells = donor_cells()
    path = tmp_path_factory.mktemp("data") / "small.h5ad"
    anndata.AnnData(
        cells.counts,
        obs=pd.DataFrame(
            {"cell_type": cells.labels, "donor": cells.donors},
            index=[f"cell{i}" for i in range(len(cells))],
        ),
        var=pd.DataFrame(index=cells.genes),
    ).write_h5ad(path)
    work = ["--splits", "1", "--jobs", "1", "--threads", "1", "--thin", "rare:6"]
    return ["choices", "--data", str(path), *work]


# ------------------------------------------------------------------ donors


@pytest.mark.parametrize("with_donors", [True, False], ids=["donors", "folds"])
def test_what_a_split_holds_out_is_nowhere_in_its_inner_split(with_donors):
    cells = donor_cells()
    if not with_donors:
        cells = replace(cells, donors=None)
    outer = make_splits(cells, n_splits=5, thin=THIN)
    inner = inner_splits(cells, n_splits=5, thin=THIN)
    assert [split.number for split in inner] == list(range(5))
    for out, split in zip(outer, inner, strict=True):
        used = np.concatenate([split.train, split.test, split.pool])
        left = np.setdiff1d(np.arange(len(cells)), out.test)
        assert np.sort(used).tolist() == left.tolist()  # each once, and all that training has
        assert cells.take(split.train).sizes()["rare"] == 6
        if with_donors:
            held_out = set(cells.donors[split.test])
            assert held_out == set(split.held_out)
            assert held_out.isdisjoint(out.held_out)
            assert held_out.isdisjoint(cells.donors[np.r_[split.train, split.pool]])
            assert len(held_out) == 2


def test_cells_of_held_out_donors_change_nothing(tmp_path):
    cells = donor_cells()
    settings = Settings(data="made here", inner=True)
    (outer, *_), (inner, *_) = make_splits(cells), inner_splits(cells)
    other = cells.counts.toarray()
    other[outer.test] = np.random.default_rng(1).poisson(50, (len(outer.test), 20))
    changed = replace(cells, counts=sparse.csr_matrix(other))
    a, b = (prepare(data, inner, settings, tmp_path) for data in (cells, changed))
    for before, after in (
        (a.training.cells, b.training.cells),
        (a.training.pool, b.training.pool),
        (a.test, b.test),
    ):
        assert (before.counts != after.counts).nnz == 0
        assert before.genes.tolist() == after.genes.tolist()
    np.testing.assert_array_equal(a.places["pca"][1], b.places["pca"][1])


# ----------------------------------------------------------------- choices


def test_choices_that_are_trained_alike_share_a_task():
    names = ["defaults", "temperature .7", "nothing pooled", "exponent 1", "latents pooled"]
    donors = ["donors of the type", "all donors", "type x donor"]
    tasks = plan(1, 1, [*names, "20 latents", "no centres", *donors], (), CHOICES)
    assert [task.arms for task in tasks] == [
        tuple(names),
        ("20 latents",),
        ("no centres",),
        tuple(donors),
    ]


def test_parameters_of_choices_are_parameters_that_differ_from_the_defaults():
    defaults = vars(CFGen())
    seen = set()
    for name, choice in CHOICES.items():
        changed = dict(getattr(choice.make, "parameters", ()))
        if choice.fit is not None:
            changed |= dict(choice.fit.parameters)
        for parameter, value in changed.items():
            assert defaults[parameter] != value, name
        same = (choice.make, choice.fit)
        assert same not in seen, name
        seen.add(same)
    assert CHOICES["defaults"].fit == Train()


def training(**changes):
    cells = donor_cells(n_donors=3)
    given = {"to_add": {"common": 5, "rare": 30}, "seed": 3} | changes
    return Training(cells, cells.take(np.arange(0)), **given)


@pytest.fixture(scope="module")
def fitted():
    """A model trained enough to tell the types apart, with donors."""
    template = CFGen(n_latent=8, max_epochs=(60, 150), device="cpu")
    return cfgen.fit_with_donors(training(), template)


def made(name, fitted, **changes):
    return CHOICES[name].make(training(**changes), fitted)


@pytest.mark.parametrize(
    "name",
    [name for name, c in CHOICES.items() if c.fit and not isinstance(c.make, choices.Allocate)],
)
def test_a_choice_makes_what_is_asked_for_and_the_same_again(fitted, name):
    before = dict(vars(fitted))
    one, two = (made(name, fitted) for _ in range(2))
    assert one.labels.tolist() == ["common"] * 5 + ["rare"] * 30
    assert (one.values != two.values).nnz == 0
    assert {name: vars(fitted)[name] for name in before} == before


def test_generation_parameters_reach_the_model_and_leave_it(fitted):
    def spread(name):
        rare = made(name, fitted, to_add={"rare": 200})
        return float(fitted.encode(rare.values).std(axis=0).mean())

    before, cold, after = (spread(name) for name in ("defaults", "temperature .7", "defaults"))
    assert cold < 0.98 * before
    assert after == before


@pytest.mark.parametrize(
    ("name", "total", "ratio"),
    [
        pytest.param("exponent 1", 35, 22 / 6, id="1/n"),
        pytest.param("exponent .25", 35, (22 / 6) ** 0.25, id="fourth root"),
        pytest.param("3 times the cells", 240, (22 / 6) ** 0.5, id="three times"),
        pytest.param("1.25 times the cells", 30, (22 / 6) ** 0.5, id="a quarter more"),
    ],
)
def test_allocations(fitted, name, total, ratio):
    labels = made(name, fitted).labels
    assert len(labels) == total
    n = {name: (labels == name).sum() for name in ("common", "rare")}
    assert n["rare"] / n["common"] == pytest.approx(ratio, rel=0.15)


def test_pooled_latents_lie_around_the_centre_of_their_type(fitted):
    many = {"to_add": {"common": 400, "rare": 400}}
    new = made("latents pooled", fitted, **many)
    network, cells = fitted.network_, training().cells
    for code, name in enumerate(fitted.classes_, start=1):
        if name == "middle":
            continue
        own = network.field.centre(torch.tensor([[code, NULL]]))
        centre = network.latent_mean + network.latent_scale * own[0]
        drawn = fitted.generate([name] * 400, latents=np.tile(centre, (400, 1)), random_state=0)
        means = new.values[new.labels == name].mean(axis=0)
        assert np.corrcoef(means, drawn.mean(axis=0))[0, 1] > 0.95
    # All types' residuals, not one's own: there are more of them than the type has cells.
    assert len(np.unique(new.values[new.labels == "rare"].toarray(), axis=0)) > 300
    assert cells.sizes()["rare"] == 18


def test_donors_are_drawn_equally_often_whatever_the_type_has(fitted, monkeypatch):
    seen = {}

    def generate(self, labels, *, covariates, guidance, random_state):
        seen.update(donors=covariates["donor"], guidance=guidance)
        return sparse.csr_matrix((len(labels), 20), dtype=np.float32)

    monkeypatch.setattr(CFGen, "generate", generate)
    made("all donors", fitted, to_add={"rare": 3000})
    _, often = np.unique(seen["donors"], return_counts=True)
    np.testing.assert_allclose(often / 3000, 1 / 3, atol=0.05)
    assert seen["guidance"] == 1.0
    made("type x donor", fitted, to_add={"rare": 30})
    assert seen["guidance"] == {"label": 1.0, "donor": 1.0}


def test_the_best_half_is_the_more_probable_one(fitted, monkeypatch):
    candidates = {}

    def probability(train, labels, test, test_labels):
        candidates["n"] = len(test_labels)
        return np.arange(len(test_labels))[::-1] / len(test_labels)  # the first are the best

    monkeypatch.setattr(choices, "logistic_probability", probability)
    kept = made("best half", fitted)
    doubled = CHOICES["defaults"].make(training(to_add={"common": 10, "rare": 60}), fitted)
    assert candidates["n"] == 70
    first = np.r_[0:5, 10:40]
    assert (kept.values != doubled.values[first]).nnz == 0


def test_changes_of_training_reach_it_and_end_with_it(quick, trainings):
    original = model._AUTO_EPOCHS
    for name in ("defaults", "double flow epochs", "no centres", "no label scales"):
        CHOICES[name].fit(training())
    default, longer, uncentred, unscaled = trainings
    assert [len(m.history_["flow"].training) for m in (default, longer)] == [1, 2]
    assert not uncentred.network_.field.effects.any()
    assert (unscaled.network_.field.scales == 1).all()
    assert unscaled.network_.field.effects[1:].any()
    assert default.network_.field.effects[1:].any()
    assert (default.network_.field.scales != 1).any()
    assert original == model._AUTO_EPOCHS


def test_choose():
    every = choose(["all"], pool=True, donors=True)
    assert every == list(CHOICES)
    fewer = set(every) - set(choose(["all"], pool=False, donors=False))
    assert fewer == {"oracle", "donors of the type", "all donors", "type x donor"}
    assert choose(["guidance 2", "defaults"], pool=True, donors=True) == [
        *("none", "nb", "mixup", "defaults", "guidance 2")
    ]
    with pytest.raises(ValueError, match=r"'no centres'.*got 'no such thing'"):
        choose(["no such thing"], pool=True, donors=True)
    with pytest.raises(ValueError, match=r"oracle.*--thin"):
        choose(["oracle"], pool=False, donors=True)
    with pytest.raises(ValueError, match="these have none"):
        choose(["all donors"], pool=True, donors=False)


# ------------------------------------------------------------------- table


def scored(f1):
    """Rows of scores from ``{(arm, split, seed, type): f1}``, for all classifiers alike."""
    return pd.DataFrame(
        [
            {
                **{"arm": arm, "split": split, "seed": seed, "type": name},
                **{"embedder": embedder, "classifier": classifier},
                **{"n_train": {"big": 900, "rare": 30, "tiny": 10}[name], "f1": value},
                **{"recall": value, "precision": value},
            }
            for (arm, split, seed, name), value in f1.items()
            for embedder, classifier in choices_table.CLASSIFIERS.values()
        ]
    )


def likeness(name, **columns):
    rows = [
        {"arm": "defaults", "split": split, "seed": 0, "type": kind, **columns}
        for split in range(2)
        for kind in ("rare", "big")
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def tables():
    f1 = {}
    for split in range(2):
        for name, before in {"big": 0.9, "rare": 0.2, "tiny": 0.4}.items():
            f1["none", split, 0, name] = before
            f1["nb", split, 0, name] = before + 0.10
            f1["mixup", split, 0, name] = before + 0.30
            # Two seeds, whose mean is .1 in the first split and .3 in the second.
            for seed in range(2):
                f1["defaults", split, seed, name] = before + 0.1 + 0.2 * split + 0.05 * (-1) ** seed
    f1["none", 1, 0, "tiny"] = np.nan  # nobody held out has any
    realism = pd.DataFrame(
        [
            {
                **{"arm": arm, "split": split, "seed": 0, "type": name},
                **{"w2": 5.0 + far, "mmd_rbf": far, "zeros": 0.5 - far, "zeros_real": 0.5},
                **{"slope": 1.5 + far, "slope_real": 1.5},
            }
            for arm in ("real", "defaults")
            for split in range(2)
            for name, far in {"big": 9.0, "rare": 0.1 + 0.2 * split, "tiny": 0.2}.items()
        ]
    )
    memorisation = realism[["arm", "split", "seed", "type"]].assign(dcr_ratio=0.9)
    return {"scores": scored(f1), "realism": realism, "memorisation": memorisation}


def test_table_by_hand(tables):
    made = choices_table.table(tables, list(CHOICES), rare_share=0.05)
    assert made.index.tolist() == ["real", "nb", "mixup", "defaults"]
    own = made.loc["defaults"]
    assert own["rare kNN"] == pytest.approx(0.2)
    assert own["common LR genes"] == pytest.approx(0.2)
    assert made.loc["nb", "all LR"] == pytest.approx(0.1)
    # Split 0 ties with nb, split 1 with mixup.
    assert own[["ahead of nb", "ahead of mixup", "splits"]].tolist() == [1, 0, 2]
    assert made.loc["mixup", "ahead of nb"] == 2
    assert np.isnan(made.loc["nb", "ahead of nb"])
    # Means over the rare types rare and tiny, and the larger difference of the two.
    assert own["MMD"] == pytest.approx(((0.1 + 0.2) / 2 + (0.3 + 0.2) / 2) / 2)
    assert own["zeros"] == own["slope"] == pytest.approx((0.2 + 0.3) / 2)
    assert own["DCR"] == pytest.approx(0.9)
    assert made.loc["real", "W2"] == pytest.approx(own["W2"])
    assert np.isnan(made.loc["real", "rare kNN"])
    thinned = choices_table.table(tables, list(CHOICES), rare_share=0.05, thinned=["tiny"])
    assert thinned.loc["defaults", "MMD"] == pytest.approx(0.2)
    assert thinned.loc["defaults", "splits"] == 1
    text = choices_table.shown(made)
    assert text.loc["defaults", "rare kNN"] == "+0.200"
    assert text.loc["defaults", "ahead of nb"] == "1"
    assert text.loc["real", "rare kNN"] == ""
    assert (
        text.loc["mixup", "to defaults LR"] == "+0.100 ± 0.141"
    )  # .2 in one split, none in the other
    assert text.loc["defaults", "to defaults LR"] == ""


def test_gains_are_those_of_the_benchmark(tables):
    scores = tables["scores"]
    made = choices_table.table(tables, list(CHOICES), rare_share=0.05)
    for row in gains(scores, rare_share=0.05).itertuples():
        shown = {value: key for key, value in choices_table.CLASSIFIERS.items()}
        if row.kind == "group" and row.measure == "f1":
            name = f"{row.group} {shown[row.embedder, row.classifier]}"
            assert made.loc[row.arm, name] == pytest.approx(row.gain), (row.arm, name)


def test_no_rare_types_and_no_results(tables):
    scores = tables["scores"][tables["scores"]["type"] == "big"]
    made = choices_table.table({**tables, "scores": scores}, list(CHOICES), rare_share=0.05)
    assert np.isnan(made.loc["defaults", "rare LR"])
    assert made.loc["defaults", "common LR"] == pytest.approx(0.2)
    without = tables["scores"][tables["scores"]["arm"] != "none"]
    with pytest.raises(ValueError, match="results of 'none'"):
        choices_table.table({**tables, "scores": without}, list(CHOICES), rare_share=0.05)


# -------------------------------------------------------------- the command


def test_command_trains_once_writes_and_goes_on(tmp_path, capsys, command, quick, trainings):
    out = tmp_path / "choices"
    first = ["--choices", "defaults", "temperature .7", "label weight .05", "--out", str(out)]
    assert main([*command, *first]) == 0
    assert len(trainings) == 2
    printed = capsys.readouterr().out
    assert "6 of 6 parts" in printed
    rows = [line.split(" | ")[0] for line in printed.splitlines() if line.startswith("| ")]
    expected = ["choice", "real", "nb", "mixup", "defaults", "label weight .05", "temperature .7"]
    assert rows == [f"| {name}" for name in expected]
    table = pd.read_csv(out / "choices.csv", index_col="choice")
    assert table.loc["temperature .7", "splits"] == 1
    assert np.isfinite(table.loc["defaults", ["rare kNN", "all LR genes", "zeros", "DCR"]]).all()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["settings"]["inner"] is True
    outer = make_splits(donor_cells(), n_splits=1)[0].held_out
    (held_out,) = pd.read_csv(out / "splits.csv")["held_out"]
    assert set(held_out.split(", ")).isdisjoint(outer)

    # Another choice trained as the defaults are: only its part is made, others are left alone.
    stamps = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    assert Part(0, 0, "label weight .05") in results.finished(out)
    assert main([*command, "--choices", "guidance 2", "--out", str(out)]) == 0
    assert "1 of 4 parts" in capsys.readouterr().out
    assert len(trainings) == 3
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert main([*command, *first]) == 0
    assert len(trainings) == 3
    assert "| guidance 2 |" in capsys.readouterr().out

    # Neither takes the other's results for its own.
    assert main(["run", *command[1:], "--arms", "nb", "--out", str(out)]) == 2
    assert "inner: True there, False now" in capsys.readouterr().err
    assert main(["report", str(out)]) == 2
    assert "those of choices" in capsys.readouterr().err


def test_unknown_choice(tmp_path, capsys, command):
    assert main([*command, "--choices", "nosuch", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "got 'nosuch'" in said
    assert "'no count splitting'" in said
    assert not (tmp_path / "out").exists()


def test_results_from_before_there_were_inner_splits_go_on(tmp_path, capsys, command):
    out = tmp_path / "results"
    run = ["run", *command[1:], "--seeds", "1", "--arms", "nb", "--out", str(out)]
    assert main(run) == 0
    path = out / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]["inner"]
    path.write_text(json.dumps(manifest))
    capsys.readouterr()
    assert main(run) == 0
    assert "0 of 2 parts" in capsys.readouterr().out


def test_rivals_are_those_of_the_benchmark():
    for name in (*choices.ALWAYS, "oracle"):
        assert CHOICES[name] is ARMS[name]
