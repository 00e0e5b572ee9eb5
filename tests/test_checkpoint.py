"""Saved models: what a directory holds, what it refuses, and that nothing in it can run."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cfgen_augment import CFGen, __version__, checkpoint

LABELS = ["B", "T", "NK", "T"]


def fit(cells, labels=None, **parameters):
    parameters = {"n_latent": 4, "max_epochs": 1, "random_state": 0, "device": "cpu"} | parameters
    return CFGen(**parameters).fit(
        cells.X,
        cells.labels if labels is None else labels,
        covariates={"donor": cells.donors},
        feature_names=[f"gene{i}" for i in range(cells.X.shape[1])],
    )


@pytest.fixture(scope="module")
def model(cells):
    return fit(cells)


@pytest.fixture
def saved(model, tmp_path):
    return model.save(tmp_path / "model")


def files(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def edit(directory, change, *, forge=True):
    """Change the configuration, with a checksum to match unless told otherwise."""
    file = directory / "config.json"
    document = json.loads(file.read_text())
    change(document)
    if forge:
        del document["config_sha256"]
        document["config_sha256"] = checkpoint._checksum(document)
    file.write_text(json.dumps(document))


# ------------------------------------------------------------------ round trip


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"likelihood": "poisson", "size_factor": "donor", "hidden": [16, 8]},
        {"dispersion": "gene-label", "condition_on_size_factor": True, "size_factor": "shared"},
        {"likelihood": "gaussian", "solver": "heun", "guidance": {"label": np.float32(1.5)}},
    ],
    ids=["default", "poisson", "gene-label", "gaussian"],
)
def test_loaded_model_generates_identically(cells, tmp_path, parameters):
    model = fit(cells, **parameters)
    loaded = CFGen.load(model.save(tmp_path / "model"), device="cpu")
    for random_state in (None, 3):
        wanted = {"covariates": {"donor": ["d1", "d2", "d3", "d1"]}, "random_state": random_state}
        a, b = model.generate(LABELS, **wanted), loaded.generate(LABELS, **wanted)
        assert type(a) is type(b)
        assert a.dtype == b.dtype
        difference = a != b
        assert difference.sum() == 0
    again = loaded.save(tmp_path / "again")
    assert (again / "weights.safetensors").read_bytes() == (
        tmp_path / "model" / "weights.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "names",
    [
        np.array(["B", "T", "CD4+ γδ / “naïve”"]),
        np.array(["B", "T", "NK"], dtype=object),
        np.array([0, 1, -7], dtype=np.int16),
        np.array([2**63, 1, 0], dtype=np.uint64),
        np.array([0.1, 1 / 3, -1e300]),
        np.array([0.1, 1 / 3, 2.0], dtype=np.float32),
        np.array([True, False, True]),
    ],
    ids=["str", "object", "int", "uint64", "float", "float32", "bool"],
)
def test_labels_survive_a_round_trip(cells, tmp_path, names):
    codes = np.unique(cells.labels, return_inverse=True)[1]
    model = fit(cells, names[codes])
    loaded = CFGen.load(model.save(tmp_path / "model"))
    assert loaded.classes_.dtype == model.classes_.dtype
    np.testing.assert_array_equal(loaded.classes_, model.classes_)
    assert (loaded.generate(names) != model.generate(names)).sum() == 0


def test_configuration_records_what_was_fitted(saved, model):
    document = json.loads((saved / "config.json").read_text())
    assert document["format"] == 4
    assert document["versions"]["cfgen-augment"] == __version__
    assert document["versions"]["torch"] == str(torch.__version__)
    assert {"numpy", "scipy", "safetensors"} < set(document["versions"])
    fitted = document["fitted"]
    assert fitted["attributes"]["label"]["values"] == ["B", "NK", "T"]
    assert fitted["attributes"]["donor"]["values"] == ["d1", "d2", "d3"]
    assert fitted["feature_names"] == [[f"gene{i}" for i in range(40)]]
    assert document["parameters"]["n_latent"] == 4
    assert "device" not in document["parameters"]
    assert len(fitted["history"]["flow"]["training"]) == 1


def test_only_safetensors_and_json(saved, model):
    assert {p.name for p in saved.iterdir()} == {"weights.safetensors", "config.json"}
    tensors = load_file(saved / "weights.safetensors")
    assert set(tensors) == set(model.network_.state_dict())
    assert list(saved.parent.iterdir()) == [saved]  # nor anything temporary beside it


def test_loading_never_unpickles(saved, monkeypatch):
    for module, name in [
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
        (np, "load"),
    ]:
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("unpickled"))
    assert CFGen.load(saved).generate(["B"]).shape == (1, 40)


def test_pickled_weights_are_refused_unread(saved):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(saved / "ran"),)

    (saved / "weights.safetensors").write_bytes(pickle.dumps(Code()))
    digest = checkpoint.hashlib.sha256((saved / "weights.safetensors").read_bytes()).hexdigest()
    edit(saved, lambda document: document.update(weights_sha256=digest))
    with pytest.raises(ValueError, match="expected a safetensors file; it is damaged"):
        CFGen.load(saved)
    assert not (saved / "ran").exists()


# ------------------------------------------------------------------ what loading refuses


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "mps", ""])
def test_unavailable_device_is_an_error(saved, device):
    with pytest.raises(ValueError, match=r"device: expected .*; got '"):
        CFGen.load(saved, device=device)


def _weights(change):
    def damage(directory):
        file = directory / "weights.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return damage


def _config(text):
    return lambda directory: (directory / "config.json").write_text(text)


def _edited(change, *, forge=True):
    return lambda directory: edit(directory, change, forge=forge)


def _flip_last(data):
    return data[:-1] + bytes([data[-1] ^ 1])


DAMAGE = {
    "truncated weights": (_weights(lambda data: data[: len(data) // 2]), "truncated or belongs"),
    "empty weights": (_weights(lambda data: b""), "truncated or belongs"),
    "one bit": (_weights(_flip_last), "truncated or belongs"),
    "truncated config": (_config('{"format": 4, "vers'), "it is damaged"),
    "empty config": (_config(""), "it is damaged"),
    "binary config": (lambda d: (d / "config.json").write_bytes(b"\xff\x00"), "it is damaged"),
    "config is a list": (_config("[1, 2]"), "it is damaged"),
    "config is a number": (_config("1"), "it is damaged"),
    "nested too deep": (_config("[" * 100_000), "it is damaged"),
    "config of something else": (_config('{"model_type": "bert"}'), "it is damaged"),
    "edited": (
        _edited(lambda d: d["fitted"]["attributes"]["label"]["values"].reverse(), forge=False),
        "was edited or damaged",
    ),
    "checksum removed": (_edited(lambda d: d.pop("config_sha256"), forge=False), "was edited"),
    "newer format": (
        _edited(lambda d: d.update(format=5)),
        rf"expected format 4; got 5\. Load .*{__version__}",
    ),
    "format before modalities": (
        _edited(lambda d: d.update(format=2)),
        rf"expected format 4; got 2\. Load .*{__version__}",
    ),
    "format as text": (_edited(lambda d: d.update(format="2", versions=None)), "got '2'"),
    "forged width": (
        _edited(lambda d: d["parameters"].update(n_latent=5)),
        "do not fit together",
    ),
    "forged likelihood": (
        _edited(lambda d: d["fitted"]["modalities"][0].update(likelihood="poisson")),
        "do not fit together",
    ),
    "forged parameter": (
        _edited(lambda d: d["parameters"].update(voltage=1)),
        "do not fit together",
    ),
    "forged classes": (
        _edited(lambda d: d["fitted"]["attributes"]["label"]["values"].pop()),
        "do not fit together",
    ),
    "forged part": (_edited(lambda d: d.pop("fitted")), "do not fit together"),
}


@pytest.mark.parametrize(("damage", "match"), DAMAGE.values(), ids=list(DAMAGE))
def test_damage_is_noticed(saved, damage, match):
    damage(saved)
    with pytest.raises(ValueError, match=match):
        CFGen.load(saved)


def test_layout_of_the_configuration_does_not_matter(saved):
    file = saved / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=7, sort_keys=True))
    assert CFGen.load(saved).classes_.tolist() == ["B", "NK", "T"]


def test_weights_of_another_model_are_refused(cells, saved, tmp_path):
    other = fit(cells, random_state=1).save(tmp_path / "other")
    (saved / "weights.safetensors").write_bytes((other / "weights.safetensors").read_bytes())
    with pytest.raises(ValueError, match="belongs to another model"):
        CFGen.load(saved)


def test_weights_written_again_are_refused(saved):
    file = saved / "weights.safetensors"
    tensors = {name: t + 1 if t.is_floating_point() else t for name, t in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(ValueError, match="checksum differs"):
        CFGen.load(saved)


@pytest.mark.parametrize("missing", ["config.json", "weights.safetensors"])
def test_missing_file_is_named(saved, missing):
    (saved / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{missing} is not there"):
        CFGen.load(saved)


@pytest.mark.parametrize("place", ["absent", "file"])
def test_loading_what_is_no_directory(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"as written by CFGen\.save"):
        CFGen.load(tmp_path / place)


# ------------------------------------------------------------------ what saving refuses


def test_unfitted_model_is_not_saved(tmp_path):
    with pytest.raises(RuntimeError, match="Call fit first"):
        CFGen().save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("beside_a_model", [False, True])
def test_foreign_files_are_never_overwritten(model, tmp_path, overwrite, beside_a_model):
    place = tmp_path / "model"
    if beside_a_model:
        model.save(place)
    place.mkdir(exist_ok=True)
    (place / "thesis.txt").write_text("dear")
    before = files(place)
    with pytest.raises(FileExistsError, match="never overwritten"):
        model.save(place, overwrite=overwrite)
    assert files(place) == before


def test_file_is_not_overwritten(model, tmp_path):
    (tmp_path / "model").write_text("dear")
    with pytest.raises(FileExistsError, match="never overwritten"):
        model.save(tmp_path / "model", overwrite=True)
    assert (tmp_path / "model").read_text() == "dear"


def test_saved_model_is_overwritten_only_when_asked(cells, saved):
    before = files(saved)
    other = fit(cells, random_state=1)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        other.save(saved)
    assert files(saved) == before
    other.save(saved, overwrite=True)
    assert files(saved) != before
    assert (CFGen.load(saved).generate(LABELS) != other.generate(LABELS)).sum() == 0
    assert list(saved.parent.iterdir()) == [saved]


def test_empty_and_nested_directories_are_filled(model, tmp_path):
    (tmp_path / "empty").mkdir()
    assert model.save(tmp_path / "empty") == tmp_path / "empty"
    model.save(str(tmp_path / "a" / "b" / "c"))
    for place in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert CFGen.load(str(place)).n_features_in_ == 40


def test_relative_paths_and_links(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save("model")
    (tmp_path / "link").symlink_to("model")
    model.save("link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert CFGen.load("model").n_features_in_ == 40


def _fail_to_serialise(monkeypatch):
    def fail(*_, **__):
        raise TypeError("no")

    monkeypatch.setattr(checkpoint.json, "dumps", fail)


def _fail_to_write(monkeypatch):
    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint.Path, "write_text", fail)


def _interrupt_the_swap(monkeypatch):
    replace = os.replace

    def interrupt(source, destination):
        if source.name == "model" and source.parent.name.startswith("."):
            raise KeyboardInterrupt
        replace(source, destination)

    monkeypatch.setattr(checkpoint.os, "replace", interrupt)


@pytest.mark.parametrize(
    ("sabotage", "error"),
    [
        (_fail_to_serialise, TypeError),
        (_fail_to_write, OSError),
        (_interrupt_the_swap, KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_failed_save_changes_nothing(cells, model, tmp_path, monkeypatch, sabotage, error, exists):
    place = tmp_path / "model"
    if exists:
        model.save(place)
    before = files(tmp_path)
    other = fit(cells, random_state=1)
    with monkeypatch.context() as patch:
        sabotage(patch)
        with pytest.raises(error):
            other.save(place, overwrite=True)
    assert files(tmp_path) == before
    assert place.exists() == exists
