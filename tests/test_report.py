"""The report shows what the tables hold, losses included, on one page that needs nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks import figures
from benchmarks.__main__ import main
from benchmarks.arms import ARMS as BENCHMARK_ARMS
from benchmarks.report import markdown_tables, write_report
from benchmarks.report_data import ARMS, COLUMNS, OPTIONAL, in_order, read_results
from benchmarks.report_html import MINUS
from benchmarks.report_quality import over_splits, realism

TYPES = {"B cells": 900, "NK & <T>": 60, "pDC": 25}
SETTINGS = [
    *[("pca", c) for c in ("knn5", "knn10", "knn30", "lr")],
    *[("scgpt", c) for c in ("knn5", "knn10", "knn30", "lr")],
    ("genes", "lr"),
]
FEW = (("pca", "knn10"), ("genes", "lr"))
VOID = {"meta", "img", "br", "link"}


def make_results(
    folder: Path,
    arms: tuple[str, ...] = ("zzz", "oracle", "cfgen", "nb", "none"),
    types: dict[str, int] | None = None,
    settings: tuple[tuple[str, str], ...] = FEW,
    seed: int = 0,
    without: tuple[str, ...] = (),
    document: dict | None = None,
) -> Path:
    """A results directory with random numbers in every column that a run writes."""
    rng = np.random.default_rng(seed)
    types = types or TYPES
    made = [arm for arm in arms if arm != "none"]
    made_of = {name: columns[1].split() for name, columns in COLUMNS.items()}
    made_of["correlation"] += OPTIONAL["correlation"][1].split()

    def table(keys: list[dict], name: str) -> pd.DataFrame:
        frame = pd.DataFrame(keys)
        for column in made_of[name]:
            if column not in frame:
                frame[column] = rng.uniform(0.1, 0.9, len(frame))
        return frame

    parts = [{"split": f"s{i}", "seed": j} for i in range(3) for j in range(2)]
    gains = []
    for embedder, classifier in settings:
        for measure in ("f1", "recall", "precision"):
            groups = [(t, "type", n) for t, n in types.items()]
            groups += [(g, "group", np.nan) for g in ("all", "rare", "common", "thinned")]
            for group, kind, n in groups:
                baseline = rng.uniform(0.3, 0.9)
                for arm in made:
                    gain = rng.normal(0.02 if kind == "group" else 0.0, 0.06)
                    half = rng.uniform(0.01, 0.05)
                    gains.append(
                        {
                            "arm": arm,
                            "embedder": embedder,
                            "classifier": classifier,
                            "measure": measure,
                            "group": group,
                            "kind": kind,
                            "n_train": n,
                            "baseline": baseline,
                            "mean": baseline + gain,
                            "gain": gain,
                            "low": gain - half,
                            "high": gain + half,
                            "wins": rng.integers(0, 4),
                            "splits": 3,
                        }
                    )
    macro = [(g, "group") for g in ("all", "rare", "common", "thinned")]
    every = [*macro, *((t, "type") for t in types)]
    keyed = [{"arm": a, "embedder": e, "classifier": c} for a in made for e, c in settings]
    typed = [{**part, "arm": a, "type": t} for part in parts for a in made for t in types]
    real = [{**part, "arm": "real", "type": t} for part in parts for t in types]
    frames = {
        "splits": table(
            [{"split": f"s{i}", "held_out": f"d{i}+d{i + 1}"} for i in range(3)], "splits"
        ),
        "scores": table(
            [
                {**part, "arm": a, "embedder": e, "classifier": c, "type": t, "n_train": n}
                for part in parts
                for a in arms
                for e, c in settings[:1]
                for t, n in types.items()
            ],
            "scores",
        ),
        "gains": pd.DataFrame(gains),
        "oracle_share": table(
            [{**key, "group": g, "kind": kind} for key in keyed for g, kind in every],
            "oracle_share",
        ),
        "correlation": table([{**key, "measure": "recall"} for key in keyed], "correlation"),
        "realism": table(typed + real, "realism"),
        "memorisation": table(typed, "memorisation"),
        "costs": table([{**part, "arm": a} for part in parts for a in arms], "costs"),
    }
    frames["oracle_share"].loc[::5, ["share", "low", "high"]] = np.nan
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        if name not in without:
            frame.to_csv(folder / f"{name}.csv", index=False)
    manifest = {
        "command": ["python -m benchmarks run --data toy"],
        "started": "2025-01-01T00:00:00",
        "finished": "2025-01-01T01:00:00",
        "complete": True,
        "missing": [],
        "data": {
            "name": "toy <cells>",
            "citation": "Someone 2018, https://doi.org/10.1038/nbt.4042 and <more>",
            "hash": "abc",
            "n_cells": 985,
            "n_genes": 40,
            "n_donors": 8,
        },
        "settings": {"rare_share": 0.05, "thin": {"pDC": 25}, "n_splits": 3},
        "versions": {"torch": "2.13.0"},
        "commit": "98e16a6",
        "hardware": "2 cores",
        "notes": ["no donors: stratified folds stand in"],
    }
    if "manifest" not in without:
        (folder / "manifest.json").write_text(json.dumps({**manifest, **(document or {})}))
    return folder


class Page(HTMLParser):
    """Checks nesting; keeps links, texts, and the rows of every table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        self.ids += [v for k, v in attrs if k == "id"]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data.replace("\N{MINUS SIGN}", "-")

    @property
    def text(self) -> str:
        return " ".join(self.texts)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    return make_results(tmp_path_factory.mktemp("results"), settings=tuple(SETTINGS))


@pytest.fixture(scope="module")
def page(results) -> Page:
    return Page(write_report(results).read_text(encoding="utf-8"))


def test_page_is_whole_and_needs_nothing_else(results, page):
    assert {link[1:] for link in page.links if link.startswith("#")} == set(page.ids)
    outside = [x for x in page.links if not x.startswith(("#", "data:image/svg+xml;base64,"))]
    assert set(outside) == {"https://doi.org/10.1038/nbt.4042"}
    source = (results / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|@import|url\(", source)


def test_same_results_give_the_same_page(tmp_path):
    first = write_report(make_results(tmp_path / "a", arms=("none", "nb"))).read_bytes()
    again = write_report(make_results(tmp_path / "b", arms=("none", "nb"))).read_bytes()
    other = write_report(make_results(tmp_path / "c", arms=("none", "nb"), seed=1)).read_bytes()
    assert again == first
    assert other != first


def test_every_gain_and_loss_of_every_type_is_on_the_page(results, page):
    gains = pd.read_csv(results / "gains.csv")
    gains = gains[(gains["measure"] == "f1") & gains["classifier"].isin(["knn10", "lr"])]
    assert (gains["gain"] < 0).sum() > 20
    cells = [cell for table in page.tables for row in table for cell in row]
    for row in gains.itertuples():
        shown = f"{row.gain:+.3f} [{row.low:.3f}, {row.high:.3f}]{row.wins} of 3"
        assert any(cell.startswith(shown) for cell in cells), row


def test_every_type_arm_and_setting_has_its_place(page):
    for name in (*TYPES, "cfgen", "nb", "oracle", "zzz", "LR on genes", "kNN (k = 10) on scgpt"):
        assert name in page.text
    arms = [row[0] for row in page.tables[0][1:]]
    assert arms == ["none (macro F1)", "nb", "cfgen", "oracle", "zzz"]


def test_losses_are_marked_as_strongly_as_gains(results):
    source = (results / "report.html").read_text(encoding="utf-8")
    shades = {"0,114,178": [], "213,94,0": []}
    pattern = r'<td style="background:rgba\((.*?),(0\.\d+)\)">(<b>)?([+\N{MINUS SIGN}])(\d\.\d+) \['
    for colour, strength, bold, sign, size in re.findall(pattern, source):
        assert (sign == "+") == (colour == "0,114,178")
        shades[colour].append((float(size), float(strength), bool(bold)))
    for entries in shades.values():
        assert max(strength for _, strength, _ in entries) == pytest.approx(0.5, abs=0.06)
        assert any(bold for _, _, bold in entries)


def test_largest_loss_of_each_arm_is_found(results, page):
    gains = pd.read_csv(results / "gains.csv")
    gains = gains[(gains["measure"] == "f1") & (gains["kind"] == "type")]
    gains = gains[gains["classifier"].isin(["knn10", "lr"])]
    table = next(t for t in page.tables if "largest loss" in t[0])
    for row in table[1:]:
        own = gains[gains["arm"] == row[0]]
        worst, best = own.loc[own["gain"].idxmin()], own.loc[own["gain"].idxmax()]
        assert row[1].startswith(f"{(own['gain'] < 0).sum()} of {len(own)}")
        assert row[3].startswith(f"{worst['gain']:+.3f}")
        assert worst["group"] in row[3]
        assert row[5].startswith(f"{best['gain']:+.3f}")


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a|b $x^2$ & \"c'", "NA", "rare"])
def test_nasty_names_are_names(tmp_path, name):
    folder = make_results(tmp_path, types={"B": 900, name: 20}, arms=("none", "nb", "cfgen"))
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert name in page.text
    assert "script" not in page.open
    markdown = markdown_tables(folder)
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    table = [r for r in rows if "(n = 20)" in r]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in table} == {4}
    assert "<script>" not in markdown.replace(r"\<", "")


@pytest.mark.parametrize("name", [*COLUMNS, "manifest"])
def test_what_is_missing_is_said_and_the_rest_is_shown(tmp_path, name):
    folder = make_results(tmp_path, arms=("none", "nb"), without=(name,))
    file = "manifest.json" if name == "manifest" else f"{name}.csv"
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert f"{file} is missing" in page.text
    assert len(page.tables) > 5
    assert markdown_tables(folder).count("|---|") >= 4


def test_gain_against_frequency_is_a_file_for_every_setting(tmp_path):
    folder = make_results(tmp_path)
    with rc_context({"svg.fonttype": "none"}):
        assert main(["figures", str(folder)]) == 0
    drawn = {path.name: path.read_text() for path in (folder / "figures").iterdir()}
    assert set(drawn) == {"fig5_LR_on_genes.svg", "fig5_kNN_k_10_on_pca.svg"}
    for text in drawn.values():
        assert "985 cells, 3 splits" in text
        assert "python -m benchmarks run --data toy" in text
        assert "pDC" not in text  # types are dots


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "gains.csv is empty"),
        ("arm,embedder\n", "gains.csv lacks the columns classifier"),
        (",".join(" ".join(COLUMNS["gains"]).split()) + "\n", "gains.csv has no rows"),
    ],
    ids=["empty", "columns", "header only"],
)
def test_files_of_no_use(tmp_path, content, said):
    folder = make_results(tmp_path, arms=("none", "nb"))
    (folder / "gains.csv").write_text(content)
    assert said in Page(write_report(folder).read_text(encoding="utf-8")).text
    assert "ains.csv" in markdown_tables(folder)


def test_a_directory_is_needed(tmp_path):
    with pytest.raises(ValueError, match="expected a results directory"):
        write_report(tmp_path / "absent")


def test_an_unfinished_run_says_so_first(tmp_path):
    missing = [f"split{i} seed0 cfgen" for i in range(14)]
    document = {"complete": False, "finished": None, "missing": missing}
    folder = make_results(tmp_path, arms=("none", "nb"), document=document)
    source = write_report(folder).read_text(encoding="utf-8")
    said = "This run is incomplete. Missing (split, seed, arm): split0 seed0 cfgen,"
    assert source.index(said) < source.index("<nav>")
    assert "and 2 more" in source
    assert markdown_tables(folder).startswith(f"**{said}")


def test_a_finished_run_has_no_banner(results, page):
    assert 'class="banner"' not in (results / "report.html").read_text(encoding="utf-8")
    assert "no donors: stratified folds stand in" in page.text


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"[-+]?\d+\.\d+", text)]


def markdown_sections(folder: Path) -> dict[str, list[list[str]]]:
    """Rows of the tables of the markdown, by ``section: table``."""
    found: dict[str, list[list[str]]] = {}
    section = title = ""
    for line in markdown_tables(folder).splitlines():
        if line.startswith("### "):
            section = line[4:]
        elif line.endswith(":"):
            title = f"{section}: {line[:-1]}"
        elif line.startswith("| "):
            found.setdefault(title, []).append([c.strip() for c in line[1:-1].split(" | ")])
    return found


def test_markdown_holds_the_numbers_of_the_tables(results):
    gains = pd.read_csv(results / "gains.csv").set_index(
        ["measure", "embedder", "classifier", "arm", "group"]
    )
    found = markdown_sections(results)
    names = {"kNN (k = 10) on pca": ("pca", "knn10"), "LR on genes": ("genes", "lr")}
    for name, setting in names.items():
        head, baseline, *rows = found[f"Gain in macro F1: {name}"]
        assert head == ["arm", "all", "rare", "thinned", "common"]
        assert [row[0] for row in rows] == ["nb", "cfgen", "oracle", "zzz"]
        for row in rows:
            for group, cell in zip(head[1:], row[1:], strict=True):
                entry = gains.loc[("f1", *setting, row[0], group)]
                expected = entry[["gain", "low", "high"]].to_numpy(dtype=float)
                np.testing.assert_allclose(numbers(cell), expected, atol=5.1e-4)
                assert cell.endswith(f"({entry['wins']:.0f} of 3)")
        entry = gains.loc[("f1", *setting, "nb", "rare")]
        assert numbers(baseline[2])[0] == pytest.approx(entry["baseline"], abs=5.1e-4)
    head, _, *rows = found["Gain by type: LR on genes"]
    assert [h.split(" (n")[0] for h in head[1:]] == ["pDC", "NK & \\<T\\>", "B cells"]
    entry = gains.loc[("f1", "genes", "lr", "cfgen", "pDC")]
    cell = next(row for row in rows if row[0] == "cfgen")[1]
    expected = entry[["gain", "low", "high"]].to_numpy(dtype=float)
    np.testing.assert_allclose(numbers(cell), expected, atol=5.1e-4)


def test_markdown_shows_correlation_shares_and_costs_as_measured(results):
    found = markdown_sections(results)
    title = "Gain against frequency: Pearson's r of the gain in recall and the share of cells"
    correlation = pd.read_csv(results / "correlation.csv").set_index(
        ["arm", "embedder", "classifier"]
    )
    head, *rows = found[title]
    place = head.index("LR on genes")
    for row in rows:
        entry = correlation.loc[(row[0], "genes", "lr")]
        expected = entry[["r", "low", "high"]].to_numpy(dtype=float)
        np.testing.assert_allclose(numbers(row[place])[:3], expected, atol=5.1e-3)
    shares = pd.read_csv(results / "oracle_share.csv")
    undefined = 0
    for name, (embedder, classifier) in {
        "kNN (k = 10) on pca": ("pca", "knn10"),
        "LR on pca": ("pca", "lr"),
    }.items():
        own = shares[(shares.embedder == embedder) & (shares.classifier == classifier)]
        own = own.set_index(["arm", "group"])["share"]
        head, *rows = found[f"Share of the oracle's gain: {name}"]
        for row in rows:
            for group, cell in zip(head[1:], row[1:], strict=True):
                if np.isnan(own[row[0], group]):
                    undefined += 1
                    assert cell == "n/a"
                else:
                    assert numbers(cell)[0] == pytest.approx(own[row[0], group], abs=5.1e-3)
    assert undefined > 0
    costs = pd.read_csv(results / "costs.csv").groupby("arm")["fit_seconds"].mean()
    for row in found["Costs: Mean over splits and seeds"][1:]:
        assert numbers(row[2])[0] == pytest.approx(costs[row[0]], abs=5.1e-3)


def test_realism_stands_beside_real_cells_of_the_thinned_type(results, page):
    frame = pd.read_csv(results / "realism.csv")
    own = frame[frame["type"] == "pDC"].groupby("arm").mean(numeric_only=True)
    head, first, *rows = markdown_sections(results)["Realism: Mean over thinned types (pDC)"]
    assert first[0] == "real cells"
    for row in [first, *rows]:
        entry = own.loc["real" if row is first else row[0]]
        shown = dict(zip(head, row, strict=True))
        assert float(shown["W2"]) == pytest.approx(entry["w2"], abs=5.1e-3)
        assert float(shown["zeros - real"]) == pytest.approx(
            entry["zeros"] - entry["zeros_real"], abs=5.1e-4
        )
    starts = [t for t in page.tables if "W2" in t[0]]
    assert len(starts) == 1 + len(TYPES)
    assert {t[1][0] for t in starts} == {"real cells"}


def test_rare_types_stand_in_where_none_are_thinned(tmp_path):
    document = {"settings": {"rare_share": 0.05, "thin": {}}}
    found = read_results(make_results(tmp_path, document=document)).focus()
    assert found == ("rare", ["pDC"])


def test_realism_differences_are_paired(tmp_path):
    """An arm without the hard split is compared with real cells in the easy one only."""
    folder = make_results(tmp_path, arms=("none", "nb", "wgan"))
    frame = pd.read_csv(folder / "realism.csv")
    hard = frame["split"] == "s0"
    frame["w2"] = np.where(hard, 9.0, 2.0) + (frame["arm"] == "wgan")
    frame = frame[~(hard & (frame["arm"] == "nb"))]
    frame.to_csv(folder / "realism.csv", index=False)
    table = realism(read_results(folder), ["pDC"], "pDC")
    rows = {row[0].text: row[table.columns.index("W2")] for row in table.rows}
    assert {name: cell.text for name, cell in rows.items()} == {
        "real cells": "4.33",
        "nb": "2.00",
        "wgan": "5.33",
    }
    assert rows["nb"].tint == 0
    assert rows["wgan"].tint == 1
    measured = {row[0].text: row[1].small for row in table.rows}
    assert measured == {"real cells": "", "nb": "2 of 3", "wgan": ""}


def test_files_of_the_first_contract_are_enough(tmp_path):
    folder = make_results(tmp_path, arms=("none", "nb"))
    for name in OPTIONAL:
        frame = pd.read_csv(folder / f"{name}.csv")
        if name == "oracle_share":
            frame = frame[frame["kind"] == "group"]
        frame[COLUMNS[name][0].split() + COLUMNS[name][1].split()].to_csv(
            folder / f"{name}.csv", index=False
        )
    read = read_results(folder)
    assert read.frequency_measure() == "f1"
    share = pd.read_csv(folder / "oracle_share.csv")["share"].iloc[1]
    assert f"{share:.2f} [" in write_report(folder).read_text(encoding="utf-8")


def test_seeds_are_averaged_within_splits_first():
    frame = pd.DataFrame({"arm": "nb", "split": ["0", "0", "0", "1"], "value": [0.0, 0, 0, 1]})
    assert over_splits(frame, ["arm"], ["value"]).loc["nb", "value"] == 0.5


def test_arms_have_one_order():
    assert tuple(BENCHMARK_ARMS) == ARMS
    shuffled = list(np.random.default_rng(0).permutation([*ARMS, "zebra", "ant"]))
    assert in_order(shuffled) == [*ARMS, "ant", "zebra"]


def test_minus_signs_replace_only_those_of_numbers():
    assert MINUS.sub("~", "-0.1 [-0.2, -.3] CD8-1 a-0.5 1-2") == "~0.1 [~0.2, ~.3] CD8-1 a-0.5 1-2"


@pytest.fixture(scope="module")
def type_gains(results) -> pd.DataFrame:
    gains = read_results(results).f1
    return gains[(gains.kind == "type") & (gains.embedder == "pca") & (gains.classifier == "lr")]


def test_figures_draw_gains_and_losses_on_a_symmetric_axis(type_gains):
    figure = figures.gains_by_type(type_gains, ["nb", "cfgen"])
    ax = figure.axes[0]
    low, high = ax.get_xlim()
    assert low == -high
    assert high >= type_gains[["gain", "low", "high"]].abs().to_numpy().max()
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "pDC (25)",
        "NK & <T> (60)",
        "B cells (900)",
    ]
    drawn = {
        (round(x, 9), round(y))
        for line in ax.lines
        for x, y in line.get_xydata()
        if line.get_marker() == "o"
    }
    own = type_gains[type_gains["arm"] == "nb"]
    places = {"pDC": 0, "NK & <T>": 1, "B cells": 2}
    assert drawn == {(round(g, 9), places[t]) for t, g in zip(own.group, own.gain, strict=True)}
    for line in ax.lines:
        if line.get_marker() == "o" and len(line.get_xdata()):
            loss = line.get_xdata()[0] < 0
            assert line.get_markeredgecolor() == (figures.LOSS if loss else figures.GAIN)


def test_dots_use_the_axes_given_or_make_their_own(type_gains):
    own = type_gains[type_gains["arm"] == "nb"]
    ax = Figure().subplots()
    assert figures.dots(own, np.arange(3.0), ax) is ax
    assert figures.dots(own, np.arange(3.0)).figure is not ax.figure


def test_frequency_panels_state_r(results, type_gains):
    correlation = read_results(results).frames["correlation"]
    correlation = correlation[(correlation.embedder == "pca") & (correlation.classifier == "lr")]
    figure = figures.gain_against_frequency(type_gains, correlation, ["nb", "unknown"])
    r = correlation.set_index("arm").loc["nb", "r"]
    assert f"r = {r:+.2f}" in figure.axes[0].get_title()
    assert "r (log) = " in figure.axes[0].get_title()
    assert "r undefined" in figure.axes[1].get_title()
    assert figure.axes[0].get_xscale() == "log"


def test_one_split_has_no_interval(tmp_path):
    folder = make_results(tmp_path, arms=("none", "nb"))
    for name in ("gains", "correlation", "oracle_share"):
        frame = pd.read_csv(folder / f"{name}.csv")
        frame[["low", "high"]] = np.nan
        frame.to_csv(folder / f"{name}.csv", index=False)
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    gain = pd.read_csv(folder / "gains.csv")["gain"].iloc[0]
    cells = [cell for table in page.tables for row in table for cell in row]
    assert any(cell.startswith(f"{gain:+.3f}") for cell in cells)
    for text in (page.text, markdown_tables(folder)):
        assert not re.search(r"\bnan\b", text)


def test_cfgen_is_paired_with_every_arm(tmp_path):
    folder = make_results(tmp_path, settings=(("pca", "knn10"), ("pca", "lr"), ("genes", "lr")))
    scores = pd.read_csv(folder / "scores.csv", keep_default_na=False)
    rng = np.random.default_rng(1)
    more = [scores.assign(embedder=e, classifier=c) for e, c in (("pca", "lr"), ("genes", "lr"))]
    for frame in more:
        frame["f1"] = rng.uniform(0.1, 0.9, len(frame))
    scores = pd.concat([scores, *more])
    scores.to_csv(folder / "scores.csv", index=False)
    (title,) = [name for name in markdown_sections(folder) if "against every" in name]
    assert "thinned types (pDC)" in title
    head, *rows = markdown_sections(folder)[title]
    assert head[1:] == [
        "kNN (k = 10) on pca",
        "LR on pca",
        "LR on genes",
        "kNN (k = 10) + LR on pca",
    ]
    assert [row[0] for row in rows] == ["nb", "oracle", "zzz"]
    own = scores[scores["type"] == "pDC"].groupby(["embedder", "classifier", "arm", "split"])["f1"]
    f1 = own.mean().unstack(["arm"])
    for row in rows:
        difference = (f1["cfgen"] - f1[row[0]]).unstack("split")
        expected = [difference.loc[s] for s in (("pca", "knn10"), ("pca", "lr"), ("genes", "lr"))]
        expected.append(expected[0] + expected[1])
        for cell, values in zip(row[1:], expected, strict=True):
            assert numbers(cell)[0] == pytest.approx(values.mean(), abs=5.1e-4)
            assert f"({(values > 0).sum()} of 3)" in cell


def test_without_cfgen_there_is_nothing_to_pair(tmp_path):
    folder = make_results(tmp_path, arms=("nb", "none"))
    assert not [name for name in markdown_sections(folder) if "against every" in name]
    assert "CFGen is not among the arms" in write_report(folder).read_text()
