"""Where the benchmark's cells come from: files, names, downloads, and a simulation."""

from __future__ import annotations

import hashlib
import logging
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from scipy import sparse, stats
from scipy.special import softmax

from benchmarks import datasets
from benchmarks.cells import Cells, log_normalise
from benchmarks.data import content_hash, load, load_cells
from benchmarks.datasets import DATA_SETS, DataSet, Source
from benchmarks.simulated import rarity_profile, simulate
from benchmarks.splits import make_splits

anndata = pytest.importorskip("anndata")
pd = pytest.importorskip("pandas")

N = 40


def make_adata(**changes):
    """Forty cells with a label, a donor and another donor column, and counts in X."""
    rng = np.random.default_rng(0)
    settings = {
        "X": sparse.csr_matrix(rng.poisson(1.0, (N, 5)).astype(np.float32)),
        "obs": {
            "cell_type": np.resize(["B cells", "T cells"], N),
            "donor": np.resize(["p1", "p2", "p3"], N),
            "batch": np.resize(["x", "y"], N),
        },
        "genes": ["CD3E", "MS4A1", "NKG7", "LYZ", "PPBP"],
    } | changes
    obs = pd.DataFrame(settings["obs"], index=[f"cell{i}" for i in range(N)])
    return anndata.AnnData(settings["X"], obs, pd.DataFrame(index=settings["genes"]))


@pytest.fixture
def write(tmp_path):
    """Writes an AnnData and returns the path as text."""

    def to_file(adata, name="cells.h5ad") -> str:
        adata.write_h5ad(tmp_path / name)
        return str(tmp_path / name)

    return to_file


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What $CFGEN_DATA names, and an empty cache for downloads."""
    import pooch

    place = tmp_path / "data"
    place.mkdir()
    monkeypatch.setenv("CFGEN_DATA", str(place))
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    return place


@pytest.fixture
def server(tmp_path):
    """Address of a server of a folder, and the folder."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

    published = tmp_path / "published"
    published.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=published)) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", published
        http.shutdown()
        thread.join()


def name_one(monkeypatch, *sources: Source) -> None:
    entry = DataSet(sources, "Nobody et al. (2020)", "https://example.org/page")
    monkeypatch.setitem(DATA_SETS, "named", entry)


def equal(one: Cells, other: Cells) -> bool:
    return content_hash(one) == content_hash(other)


# --- files ------------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was_written(write):
    adata = make_adata()
    adata.obsm["X_pca"] = np.random.default_rng(1).normal(size=(N, 3))
    cells = load_cells(write(adata))
    assert cells.counts.format == "csr"
    assert cells.counts.dtype == np.float32
    assert np.array_equal(cells.counts.toarray(), adata.X.toarray())
    assert cells.labels.tolist() == adata.obs["cell_type"].tolist()
    assert cells.donors.tolist() == adata.obs["donor"].tolist()
    assert cells.genes.tolist() == adata.var_names.tolist()
    assert np.array_equal(cells.obsm["X_pca"], adata.obsm["X_pca"])


def test_keys_and_layer_are_the_callers(write):
    adata = make_adata()
    adata.layers["counts"] = adata.X.toarray() * 2
    adata.X = log_normalise(adata.X)
    cells = load_cells(write(adata), label_key="batch", donor_key="cell_type", layer="counts")
    assert set(cells.labels) == {"x", "y"}
    assert set(cells.donors) == {"B cells", "T cells"}
    assert np.array_equal(cells.counts.toarray(), adata.layers["counts"])


def test_counts_and_symbols_as_cellxgene_keeps_them(write):
    counts = make_adata()
    adata = counts.copy()
    adata.var["feature_name"] = [" CD3E", "MS4A1", "NKG7", "LYZ", "PPBP "]
    adata.var_names = [f"ENSG{i}" for i in range(5)]
    adata.obs = adata.obs.rename(columns={"donor": "donor_id"})
    adata.raw = adata.copy()
    adata = adata[:, :3].copy()
    adata.X = log_normalise(adata.X)
    cells = load_cells(write(adata), layer="raw")
    assert equal(cells, load_cells(write(counts, "plain.h5ad")))


@pytest.mark.parametrize(
    ("obs", "said"),
    [
        pytest.param({"cell_type": ["B cells", "T cells"] * 20}, "", id="no column"),
        pytest.param(
            {"cell_type": ["B cells", "T cells"] * 20, "donor": ["p1"] * N},
            "names one donor only",
            id="one donor",
        ),
    ],
)
def test_without_several_donors_there_are_none(write, caplog, obs, said):
    assert load_cells(write(make_adata(obs=obs))).donors is None
    assert said in caplog.text


def test_cells_without_label_or_donor_are_dropped_and_counted(write, caplog):
    adata = make_adata()
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(object)
    adata.obs.loc["cell3", "cell_type"] = None
    adata.obs["donor"] = pd.Categorical(adata.obs["donor"])
    adata.obs.loc[["cell3", "cell7", "cell8"], "donor"] = np.nan
    cells = load_cells(write(adata))
    assert len(cells) == N - 3
    assert np.array_equal(cells.counts.toarray(), np.delete(adata.X.toarray(), [3, 7, 8], axis=0))
    assert "Dropped 1 of 40 cells, which have no value in obs['cell_type']" in caplog.text
    assert "Dropped 2 of 39 cells, which have no value in obs['donor']" in caplog.text


def test_genes_of_the_same_name_are_numbered_and_it_is_said(write, caplog):
    adata = make_adata()
    adata.var["feature_name"] = ["CD3E", "CD3E ", "NKG7", "LYZ", "CD3E"]
    cells = load_cells(write(adata))
    assert cells.genes.tolist() == ["CD3E", "CD3E-1", "NKG7", "LYZ", "CD3E-2"]
    assert "1 gene names occur more than once, among them CD3E" in caplog.text


@pytest.mark.parametrize(
    ("change", "arguments", "error", "match"),
    [
        pytest.param(
            {},
            {"label_key": "type"},
            KeyError,
            r"label_key.*cell_type, donor, batch.*'type'",
            id="label",
        ),
        pytest.param(
            {},
            {"donor_key": "who"},
            KeyError,
            r"donor_key.*cell_type, donor, batch.*'who'",
            id="donor",
        ),
        pytest.param({}, {"layer": "counts"}, KeyError, "layer.*'counts'", id="layer"),
        pytest.param({}, {"layer": "raw"}, KeyError, "layer.*'raw'", id="no raw"),
        pytest.param(
            {"X": np.full((N, 5), 0.5)}, {}, ValueError, "expected raw counts", id="fractions"
        ),
        pytest.param({"X": -np.ones((N, 5))}, {}, ValueError, "expected raw counts", id="negative"),
        pytest.param(
            {"obs": {"cell_type": [np.nan] * N}},
            {},
            ValueError,
            "all 40 cells lack",
            id="no labels",
        ),
    ],
)
def test_errors_of_files(write, change, arguments, error, match):
    with pytest.raises(error, match=match):
        load_cells(write(make_adata(**change)), **arguments)


def test_a_missing_file_is_not_taken_for_a_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_cells(str(tmp_path / "cells.h5ad"))


def test_demo_has_labels_and_no_donors():
    cells, adata = load_cells("demo"), load("demo")
    assert cells.counts.shape == (700, 765)
    assert len(cells.sizes()) == 10
    assert cells.donors is None
    assert (cells.counts != adata.X).nnz == 0


# --- names ------------------------------------------------------------------------------------


def test_a_name_is_looked_for_in_the_data_folder(folder):
    make_adata().write_h5ad(folder / "mine.h5ad")
    assert len(load_cells("mine")) == N


def test_listed_files_come_first_and_bring_their_keys(folder, monkeypatch, caplog):
    name_one(
        monkeypatch,
        Source("first.h5ad"),
        Source("second.h5ad", label_key="batch", only=("donor", "p1"), unlabelled=("y",)),
    )
    make_adata().write_h5ad(folder / "named.h5ad")
    assert set(load_cells("named").labels) == {"B cells", "T cells"}
    make_adata().write_h5ad(folder / "second.h5ad")
    cells = load_cells("named")
    assert set(cells.labels) == {"x"}
    assert len(cells) == 7
    assert "Dropped 7 of 14 cells" in caplog.text
    assert set(load_cells("named", label_key="cell_type", donor_key="batch").donors) == {"x", "y"}


def test_an_unknown_name_lists_the_known_ones(folder):
    with pytest.raises(FileNotFoundError, match=r"demo, simulated, kang.*looked for kangg\.h5ad"):
        load_cells("kangg")


def test_what_is_not_published_is_said_to_be_so(monkeypatch):
    monkeypatch.delenv("CFGEN_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"not set.*not published.*doi:10\.1126"):
        load_cells("onek1k")


def test_the_simulation_has_no_keys():
    assert equal(load_cells("simulated"), simulate()[0])
    with pytest.raises(ValueError, match="simulated: expected no label_key"):
        load_cells("simulated", donor_key="donor")


def test_the_table_says_whose_data_and_how_they_are_checked():
    for entry in DATA_SETS.values():
        assert "20" in entry.citation
        assert "https://" in entry.page
        for source in entry.sources:
            assert source.file.endswith(".h5ad")
            assert source.url is None or source.url.startswith("https://")
            assert source.url is None or source.record is None
            if source.sha256 is not None:
                assert source.url is not None
                assert len(bytes.fromhex(source.sha256)) == 32


# --- downloads --------------------------------------------------------------------------------


def test_a_download_is_verified_and_kept(folder, server, monkeypatch, caplog):
    address, published = server
    make_adata().write_h5ad(published / "cells.h5ad")
    checksum = hashlib.sha256((published / "cells.h5ad").read_bytes()).hexdigest()
    name_one(monkeypatch, Source("cells.h5ad", f"{address}/cells.h5ad", checksum))
    assert len(load_cells("named")) == N
    assert "could not be verified" not in caplog.text
    (published / "cells.h5ad").unlink()
    assert len(load_cells("named")) == N, "the second time it comes from the cache"


def test_a_download_that_changed_is_refused(folder, server, monkeypatch, tmp_path):
    address, published = server
    make_adata().write_h5ad(published / "cells.h5ad")
    name_one(monkeypatch, Source("cells.h5ad", f"{address}/cells.h5ad", "0" * 64))
    with pytest.raises(ValueError, match=r"not what was expected: SHA256 hash.*Nobody et al"):
        load_cells("named")
    assert not list((tmp_path / "cache").rglob("*.h5ad"))


def test_a_download_without_a_known_checksum_says_so_and_tells_it(
    folder, server, monkeypatch, caplog
):
    address, published = server
    make_adata().write_h5ad(published / "cells.h5ad")
    name_one(monkeypatch, Source("cells.h5ad", f"{address}/cells.h5ad"))
    load_cells("named")
    assert "could not be verified" in caplog.text
    assert hashlib.sha256((published / "cells.h5ad").read_bytes()).hexdigest() in caplog.text


def test_a_download_that_fails_says_where_it_looked_and_what_to_do(folder, monkeypatch):
    nowhere = "http://127.0.0.1:9/cells.h5ad"  # nothing listens there
    name_one(monkeypatch, Source("cells.h5ad", nowhere))
    with pytest.raises(FileNotFoundError) as error:
        load_cells("named")
    for part in (
        "cells.h5ad or named.h5ad",
        str(folder),
        nowhere,
        "refused",
        "Nobody et al. (2020)",
    ):
        assert part in str(error.value)


def test_a_record_brings_its_own_checksums(folder, server, monkeypatch):
    import pooch

    address, published = server
    make_adata().write_h5ad(published / "cells.h5ad")
    checksum = hashlib.md5((published / "cells.h5ad").read_bytes()).hexdigest()

    def registry(record: pooch.Pooch) -> None:
        assert record.base_url == "doi:10.5281/zenodo.1/"
        record.registry["cells.h5ad"] = f"md5:{checksum}"
        record.urls["cells.h5ad"] = f"{address}/cells.h5ad"

    monkeypatch.setattr(pooch.Pooch, "load_registry_from_doi", registry)
    name_one(monkeypatch, Source("other.h5ad", record="10.5281/zenodo.1"))
    with pytest.raises(
        ValueError, match=r"expected other\.h5ad in the record; it holds cells\.h5ad"
    ):
        load_cells("named")
    name_one(monkeypatch, Source("cells.h5ad", record="10.5281/zenodo.1"))
    assert len(load_cells("named")) == N
    make_adata().write_h5ad(published / "cells.h5ad")
    checksum = "0" * 32
    datasets.Path(pooch.os_cache("cfgen-augment"), "cells.h5ad").unlink()
    with pytest.raises(ValueError, match="MD5 hash"):
        load_cells("named")


# --- content hash -----------------------------------------------------------------------------


def test_the_hash_is_of_content_not_of_storage():
    cells, _ = simulate(n_donors=2, cells_per_donor=30, n_genes=10)
    counts = cells.counts.copy()
    counts.indices = counts.indices.astype(np.int64)
    counts.indptr = counts.indptr.astype(np.int64)
    coo = cells.counts.tocoo()
    shuffled = np.random.default_rng(0).permutation(coo.nnz)
    zeros = sparse.csr_matrix(
        (
            np.append(coo.data[shuffled], 0),
            (np.append(coo.row[shuffled], 3), np.append(coo.col[shuffled], 3)),
        ),
        shape=coo.shape,
    )
    assert equal(cells, replace(cells, counts=counts))
    assert equal(cells, replace(cells, counts=zeros))
    assert equal(cells, replace(cells, labels=cells.labels.astype(object)))


def test_the_hash_changes_with_everything():
    cells, _ = simulate(n_donors=2, cells_per_donor=30, n_genes=10)
    more = cells.counts.copy()
    more.data[5] += 1
    variants = [
        cells,
        replace(cells, counts=more),
        replace(cells, labels=np.roll(cells.labels, 1)),
        replace(cells, genes=cells.genes[::-1]),
        replace(cells, donors=None),
        replace(cells, obsm={"X": np.zeros((60, 2))}),
        replace(cells, obsm={"X": np.zeros((60, 3))}),
        cells.take(np.arange(59)),
        # Names joined differently are not the same names.
        replace(cells, labels=np.array(["a,b", "c"] * 30)),
        replace(cells, labels=np.array(["a", "b,c"] * 30)),
    ]
    assert len({content_hash(variant) for variant in variants}) == len(variants)


# --- simulation -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated():
    return simulate()


def test_simulated_data_have_the_stated_shape(simulated):
    cells, truth = simulated
    assert cells.counts.shape == (3000, 300)
    assert len(set(cells.donors)) == 8
    assert np.array_equal(truth.types[truth.type_of], cells.labels)
    assert np.array_equal(truth.donors[truth.donor_of], cells.donors)
    assert np.bincount(truth.donor_of).tolist() == [375] * 8


def test_types_get_as_rare_as_stated():
    shares = rarity_profile(8, 0.01)
    assert np.isclose(shares.sum(), 1)
    assert np.isclose(shares[-1], 0.01)
    assert np.allclose(shares[1:] / shares[:-1], shares[1] / shares[0])
    assert np.allclose(rarity_profile(4, 0.25), 0.25)
    with pytest.raises(ValueError, match="at most 1/8"):
        rarity_profile(8, 0.2)
    cells, truth = simulate(cells_per_donor=2000, n_genes=2)
    expected = truth.type_shares.mean(axis=0) * len(cells)
    counted = np.bincount(truth.type_of, minlength=8)
    assert stats.chisquare(counted, expected).pvalue > 1e-3
    assert 0.005 < counted.min() / len(cells) < 0.02


def test_counts_have_the_moments_of_the_negative_binomial(simulated):
    cells, truth = simulated
    x, mean = cells.counts.toarray().astype(float), truth.means()
    assert np.allclose(mean.sum(axis=1), truth.size_factors)
    variance = mean + mean**2 / truth.theta
    z = (x - mean) / np.sqrt(variance)
    # Fourth central moment of a negative binomial: 3 v^2 + v (1 + 6 v / theta).
    error = np.sqrt((2 + (1 / variance) * (1 + 6 * variance / truth.theta)).mean() / x.size)
    assert abs(z.mean()) < 4 / np.sqrt(x.size)
    assert abs((z**2).mean() - 1) < 4 * error
    # Against zeros too, which moments do not see: P(0) = (1 + mu / theta)^-theta.
    zero = (1 + mean / truth.theta) ** -truth.theta
    assert abs((x == 0).mean() - zero.mean()) < 4 * np.sqrt((zero * (1 - zero)).sum()) / x.size
    # A Poisson with the same means is told apart.
    assert ((x - mean) ** 2 / mean).mean() > 1.2


def test_size_factors_are_log_normal(simulated):
    _, truth = simulated
    logs = np.log(truth.size_factors)
    assert stats.kstest((logs - np.log(400)) / 0.4, "norm").pvalue > 1e-3


def test_donors_differ_as_stated():
    """Within a type, log profiles of donors differ with variance donor_sd^2 + interaction_sd^2."""

    def between(donor_sd, interaction_sd):
        # Deep and many, so that sampling hardly adds to the variance.
        cells, truth = simulate(
            n_donors=10, cells_per_donor=400, n_genes=40, n_types=2, rarest=0.5, depth=4000,
            donor_sd=donor_sd, interaction_sd=interaction_sd, seed=3,
        )  # fmt: skip
        profiles = np.empty((2, 10, 40))
        for k in range(2):
            for d in range(10):
                rows = (truth.type_of == k) & (truth.donor_of == d)
                totals = np.asarray(cells.counts[rows].sum(axis=0)).ravel()
                profiles[k, d] = np.log(totals + 0.5)
        profiles -= profiles.mean(axis=2, keepdims=True)  # the softmax fixes no level
        first, second = (p - p.mean(axis=0) for p in profiles)
        return ((first**2).mean() + (second**2).mean()) / 2 * 10 / 9, (
            first * second
        ).mean() * 10 / 9

    total, shared = between(0.3, 0.4)
    assert np.isclose(total, 0.3**2 + 0.4**2, rtol=0.2)
    assert np.isclose(shared, 0.3**2, rtol=0.3), "what the types of a donor share"
    total, shared = between(0.0, 0.0)
    assert total < 0.02
    assert abs(shared) < 0.01


def test_rare_types_have_a_common_relative(simulated):
    _, truth = simulated
    assert truth.types.tolist() == ["A1", "B1", "C1", "D1", "A2", "B2", "C2", "D2"]
    profile = np.log(softmax(truth.baseline + truth.programmes, axis=1))
    distance = ((profile[:, None] - profile[None]) ** 2).mean(axis=2)
    np.fill_diagonal(distance, np.inf)
    assert distance.argmin(axis=1).tolist() == [4, 5, 6, 7, 0, 1, 2, 3]


def test_classes_are_neither_easy_nor_hopeless_on_held_out_donors(simulated):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    cells, _ = simulated
    scores = []
    for split in make_splits(cells, n_splits=4)[:2]:
        train, test = cells.take(split.train), cells.take(split.test)
        model = LogisticRegression(max_iter=200).fit(log_normalise(train.counts), train.labels)
        found = model.predict(log_normalise(test.counts))
        scores.append(f1_score(test.labels, found, average="macro"))
    assert 0.75 < np.mean(scores) < 0.95


def test_the_simulation_follows_its_seed():
    sizes = {"n_donors": 3, "cells_per_donor": 20, "n_genes": 15}
    assert equal(simulate(**sizes, seed=1)[0], simulate(**sizes, seed=1)[0])
    assert not equal(simulate(**sizes, seed=1)[0], simulate(**sizes, seed=2)[0])
    with pytest.raises(ValueError, match="n_donors: expected 1 or more"):
        simulate(n_donors=0)


# --- real files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "shape", "n_types", "n_donors"),
    [
        ("kang", "kang_pbmc_ctrl_8donors.h5ad", (12_261, 1_287), 8, 8),
        ("onek1k", "onek1k_subset_40donors.h5ad", (7_811, 1_000), 4, 40),
        ("pbmc3k", "pbmc3k.h5ad", (2_638, 13_714), 9, None),
    ],
)
def test_named_files(real_data, monkeypatch, caplog, name, file, shape, n_types, n_donors):
    monkeypatch.setenv("CFGEN_DATA", str(real_data(file).parent))
    with caplog.at_level(logging.WARNING):
        cells = load_cells(name)
    assert cells.counts.shape == shape
    assert len(cells.sizes()) == n_types
    assert (None if cells.donors is None else len(set(cells.donors))) == n_donors
    assert all(gene == gene.strip() for gene in cells.genes)
    assert ("Dropped 62 of 2,700 cells" in caplog.text) == (name == "pbmc3k")
