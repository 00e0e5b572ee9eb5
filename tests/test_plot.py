"""Figures hold the numbers they claim, and the report is one page that needs nothing else."""

from __future__ import annotations

import base64
import builtins
import re
from html.parser import HTMLParser

import anndata
import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import simulate
from matplotlib.figure import Figure
from scipy import sparse

from cfgen_augment import diagnose, plot
from cfgen_augment.report import write_report

FIGURES = (plot.mean_variance, plot.zeros_per_cell, plot.markers, plot.accessibility)


@pytest.fixture(scope="module")
def augmented():
    """Real cells of three types, the rarest with most generated cells; one named like a formula."""
    cells = simulate({"B": 130, "$T<&$": 90, "NK": 60}, n_genes=30)
    labels = np.concatenate([cells.labels, np.repeat("NK", 40)])
    X = sparse.vstack([cells.X, cells.X[cells.labels == "NK"][:40]]).tocsr()
    made = anndata.AnnData(
        X.astype(np.float32),
        obs=pd.DataFrame({"cell_type": labels}, index=[f"cell{i}" for i in range(len(labels))]),
    )
    made.var_names = [f"gene{i}" for i in range(30)]
    made.obs["is_synthetic"] = np.random.default_rng(0).random(made.n_obs) < 0.5
    return made


@pytest.fixture
def ax():
    return Figure().subplots()


def of(adata, label, synthetic):
    rows = (adata.obs["cell_type"] == label) & (adata.obs["is_synthetic"] == synthetic)
    return adata.X[rows.to_numpy()].toarray().astype(np.float64)


@pytest.mark.parametrize("draw", FIGURES)
def test_axes_come_back_and_settings_stay(augmented, ax, draw):
    before = dict(matplotlib.rcParams)
    assert draw(augmented, label_key="cell_type", ax=ax) is ax
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    assert ax.get_legend() is not None
    ax.figure.canvas.draw()
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("draw", FIGURES)
def test_without_axes_pyplot_makes_them(augmented, draw):
    matplotlib.use("agg")
    from matplotlib import pyplot

    made = draw(augmented, label_key="cell_type")
    assert pyplot.fignum_exists(made.figure.number)
    pyplot.close(made.figure)


def test_mean_and_variance_are_those_of_as_many_cells_of_every_type(augmented, ax):
    """All cells of the types are equally many here, so that no sample is drawn."""
    of_type = {
        label: min(len(of(augmented, label, side)) for side in (False, True))
        for label in augmented.obs["cell_type"].unique()
    }
    rows = []
    for label, number in of_type.items():
        for side in (False, True):
            mask = (augmented.obs["cell_type"] == label) & (augmented.obs["is_synthetic"] == side)
            rows += np.flatnonzero(mask)[:number].tolist()
    even = augmented[np.sort(rows)]
    plot.mean_variance(even, label_key="cell_type", ax=ax)
    for dots, side in zip(ax.collections, (False, True), strict=True):
        counts = np.concatenate([of(even, label, side) for label in of_type])
        expected = np.stack([counts.mean(axis=0), counts.var(axis=0)], axis=1)
        np.testing.assert_allclose(np.asarray(dots.get_offsets()), expected)
    (line,) = ax.lines
    np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_zeros_are_counted_in_as_many_real_as_generated_cells(augmented, ax):
    odd = augmented.copy()
    odd.X.data[::7] = 0  # stored zeros are zeros
    plot.zeros_per_cell(odd, label_key="cell_type", ax=ax)
    total = sum(
        min(len(of(odd, label, side)) for side in (False, True))
        for label in odd.obs["cell_type"].unique()
    )
    heights = [patch.get_xy()[:, 1].tolist() for patch in ax.patches]
    assert [sum(h) / 2 for h in heights] == [total, total]
    shares = [(of(odd, label, True) == 0).mean(axis=1) for label in odd.obs["cell_type"].unique()]
    edges = ax.patches[1].get_xy()[:, 0]
    assert edges.min() <= np.concatenate(shares).min()
    assert np.concatenate(shares).max() <= edges.max()


def test_markers_are_means_of_log_values_and_r_is_theirs(augmented, ax):
    genes = ["gene3", "gene17"]
    plot.markers(augmented, label_key="cell_type", genes=genes, ax=ax, max_cells=1000)
    assert len(ax.collections) == 3
    dots = np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections])
    assert dots.shape == (6, 2)
    r = float(re.search(r"r = ([-.\d]+)", ax.get_title())[1])
    assert r == pytest.approx(np.corrcoef(dots.T)[0, 1], abs=5e-4)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(names) == ["$T<&$", "B", "NK"]
    # The side with fewer cells is drawn whole.
    sides = [of(augmented, "B", side) for side in (False, True)]
    column, fewer = min(enumerate(sides), key=lambda pair: len(pair[1]))
    logs = np.log1p(1e4 * fewer / np.maximum(fewer.sum(axis=1, keepdims=True), 1))
    found = np.asarray(ax.collections[names.index("B")].get_offsets())
    np.testing.assert_allclose(found[:, column], logs.mean(axis=0)[[3, 17]], rtol=1e-4)


def test_markers_are_found_by_the_real_cells(ax):
    """Each type has a gene of its own."""
    counts = np.ones((120, 6))
    labels = np.repeat(["a", "b", "c"], 40)
    for i, name in enumerate(["a", "b", "c"]):
        counts[labels == name, 2 * i] = 20
    made = anndata.AnnData(
        sparse.csr_matrix(counts),
        obs=pd.DataFrame({"type": labels}, index=[str(i) for i in range(120)]),
    )
    made.obs["is_synthetic"] = np.arange(120) % 2 == 0
    plot.markers(made, label_key="type", n_markers=1, ax=ax)
    drawn = np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections])
    assert drawn.shape == (9, 2)
    assert (drawn[:, 0] > np.log(5000)).sum() == 3
    assert "r = 1.000" in ax.get_title()


def test_genes_that_are_not_there(augmented, ax):
    with pytest.raises(KeyError, match="genes: expected names of genes of real; got CD3D"):
        plot.markers(augmented, label_key="cell_type", genes=["gene1", "CD3D"], ax=ax)


def test_accessibility_is_the_share_of_open_cells_and_r_is_of_each_type(ax):
    """Peaks that no cell has open would make any two sides look alike."""
    random = np.random.default_rng(0)
    opened = (random.random((120, 30)) < random.random(30)) * 3.0
    opened[:, 20:] = 0
    labels = np.repeat(["a", "b"], 60)
    made = anndata.AnnData(
        sparse.csr_matrix(opened),
        obs=pd.DataFrame({"type": labels}, index=[str(i) for i in range(120)]),
    )
    made.obs["is_synthetic"] = np.arange(120) % 2 == 0
    plot.accessibility(made, label_key="type", ax=ax)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(ax.collections) == 2
    for dots, label, name in zip(ax.collections, ["a", "b"], names, strict=True):
        shares = np.stack(
            [
                (opened[(labels == label) & (np.arange(120) % 2 == side)] > 0).mean(axis=0)[:20]
                for side in (1, 0)
            ]
        )
        np.testing.assert_allclose(np.asarray(dots.get_offsets()).T, shares)
        assert name == f"{label}, r = {np.corrcoef(shares)[0, 1]:.3f}"


@pytest.fixture
def without_matplotlib(monkeypatch):
    imported = builtins.__import__

    def refuse(name, *rest):
        if name.split(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_without_matplotlib_the_error_names_what_to_install(
    augmented, without_matplotlib, tmp_path
):
    for draw in FIGURES:
        with pytest.raises(ImportError, match=r"pip install 'cfgen-augment\[plot\]'"):
            draw(augmented, label_key="cell_type")
    with pytest.raises(ImportError, match=r"pip install 'cfgen-augment\[plot\]'"):
        write_report(tmp_path / "out.html", augmented, label_key="cell_type")
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------- the report


class Page(HTMLParser):
    """Cells of the first table, sources of pictures, and every address in the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[tuple[str, str | None]]] = []
        self.pictures: list[str] = []
        self.addresses: list[str] = []
        self._shade: str | None = None
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._inside, self._shade = True, given.get("class")
            self.rows[-1].append(("", self._shade))
        if tag == "img":
            self.pictures.append(given["src"])

    def handle_endtag(self, tag):
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self._inside:
            self.rows[-1][-1] = (self.rows[-1][-1][0] + data, self._shade)


def test_the_report_is_one_page_with_table_and_figures(augmented, tmp_path):
    made = tmp_path / "out.html"
    table = write_report(made, augmented, label_key="cell_type", random_state=1)
    expected = diagnose(augmented, label_key="cell_type", random_state=1)
    pd.testing.assert_frame_equal(table, expected)
    page = Page(made.read_text(encoding="utf-8"))
    assert [text for text, _ in page.rows[0]] == ["type", *table.columns]
    shown = {row[0][0]: row for row in page.rows[1 : 1 + len(table)]}
    assert set(shown) == {"B", "$T<&$", "NK"}
    for label, row in shown.items():
        assert row[-1][0] == table.loc[label, "verdict"]
        failing = {c for c, (_, shade) in zip(table.columns, row[1:], strict=True) if shade}
        assert failing == set(table.loc[label, "verdict"].split(", ")) & set(table.columns)
    assert len(page.pictures) == 3
    for picture in page.pictures:
        kind, data = picture.split(",")
        assert kind == "data:image/svg+xml;base64"
        assert base64.b64decode(data).rstrip().endswith(b"</svg>")
    assert all(address.startswith("data:") for address in page.addresses)
    again = tmp_path / "again.html"
    write_report(again, augmented, label_key="cell_type", random_state=1)
    assert again.read_bytes() == made.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.html", "out.html"]


def test_a_report_in_the_way_is_kept(augmented, tmp_path):
    made = tmp_path / "out.html"
    made.write_text("precious")
    with pytest.raises(FileExistsError, match=r"it exists\. Pass --force"):
        write_report(made, augmented, label_key="cell_type")
    assert made.read_text() == "precious"
    write_report(made, augmented, label_key="cell_type", overwrite=True, max_cells=40)
    assert "Diagnosis" in made.read_text()


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("out.pdf", "that ends in .html; it ends in '.pdf'"),
        (".", "expected a file name; it is a directory"),
        ("absent/out.html", "expected a directory that can be written to"),
    ],
)
def test_places_that_cannot_hold_a_report(augmented, tmp_path, name, match):
    with pytest.raises(ValueError, match=re.escape(match).replace("\\.html", ".html")):
        write_report(tmp_path / name, augmented, label_key="cell_type")


@pytest.mark.parametrize("most", [0, -3, 10.0])
def test_a_number_of_cells_is_checked(augmented, most):
    with pytest.raises(ValueError, match="max_cells: expected a whole number from 1"):
        plot.zeros_per_cell(augmented, label_key="cell_type", max_cells=most)


def test_genes_come_in_any_form(augmented, ax):
    for genes in ("gene3", iter(["gene3"])):
        ax.clear()
        plot.markers(augmented, label_key="cell_type", genes=genes, ax=ax)
        assert len(ax.collections[0].get_offsets()) == 1
    for options in ({"genes": []}, {"n_markers": 0}):
        with pytest.raises(ValueError, match="expected at least one gene"):
            plot.markers(augmented, label_key="cell_type", **options)
