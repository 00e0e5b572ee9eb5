"""Cells on disk: read in blocks, shuffled in buffers, and trained on as if they were in memory."""

from __future__ import annotations

import anndata
import h5py
import numpy as np
import pytest
from anndata.io import sparse_dataset, write_elem
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from cfgen_augment import CFGen, CFGenSampler, augment, stored
from cfgen_augment.counts import check_cells, dense_rows, feature_moments, total_counts
from cfgen_augment.stored import StoredCells, UnreadableError, as_stored, buffers, in_order, keep

zarr = pytest.importorskip("zarr")


@pytest.fixture(params=["h5ad-csr", "h5ad-dense", "h5ad-gzip", "zarr-csr", "zarr-dense"])
def on_disk(request, cells, tmp_path):
    """The counts of `cells` in a file, as anndata hands them out."""
    store, form = request.param.split("-")
    X = cells.X.astype(np.float32)
    if store == "zarr":
        group = zarr.open_group(str(tmp_path / "cells.zarr"), mode="w", zarr_format=2)
    else:
        group = h5py.File(tmp_path / "cells.h5ad", "w")
    options = {"compression": "gzip", "chunks": (200,)} if form == "gzip" else {}
    write_elem(group, "X", X.toarray() if form == "dense" else X, dataset_kwargs=options)
    yield group["X"] if form == "dense" else sparse_dataset(group["X"])
    if store == "h5ad":
        group.close()


@pytest.fixture
def small_buffers(monkeypatch):
    """Some 20 cells to a buffer, two to five to a run."""
    monkeypatch.setattr(stored, "_BUFFER_VALUES", 600)
    monkeypatch.setattr(stored, "_CHUNK_ROWS", 4)
    monkeypatch.setattr(stored, "_FILE_CHUNKS", 0)


def dense(X):
    return X.toarray() if sparse.issparse(X) else np.asarray(X)


# -------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "rows",
    [
        slice(None),
        slice(3, 90),
        slice(5, 5),
        np.array([7]),
        np.array([149, 0, 3, 3]),
        np.arange(150)[::-1],
        np.array([], dtype=int),
    ],
    ids=["all", "slice", "empty-slice", "one", "unsorted", "backwards", "none"],
)
def test_rows_are_those_of_memory(on_disk, cells, rows):
    X = StoredCells(on_disk)
    assert X.shape == cells.X.shape
    assert X.dtype == np.float32
    np.testing.assert_array_equal(dense(X[rows]), cells.X.toarray()[rows])
    np.testing.assert_array_equal(dense_rows(X, rows), cells.X.toarray()[rows])


@pytest.mark.parametrize("n_rows", [1, 7, 64, 1000])
def test_blocks_in_order_are_all_cells(on_disk, cells, small_buffers, n_rows):
    parts = list(in_order(StoredCells(on_disk), n_rows))
    assert all(rows.stop - rows.start == block.shape[0] <= n_rows for rows, block in parts)
    assert [rows.start for rows, _ in parts] == list(range(0, 150, n_rows))
    np.testing.assert_array_equal(np.vstack([dense(b) for _, b in parts]), cells.X.toarray())


def test_one_pass_checks_and_sums_up(on_disk, cells, small_buffers, monkeypatch):
    reads = []
    original = StoredCells.read
    monkeypatch.setattr(
        StoredCells, "read", lambda self, *at: reads.append(at) or original(self, *at)
    )
    X = check_cells(on_disk, "count")
    assert check_cells(X, "count") is X
    np.testing.assert_array_equal(total_counts(X), total_counts(cells.X))
    for found, expected in zip(feature_moments(X), feature_moments(cells.X), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert sorted(row for at in reads for row in range(*at)) == list(range(150))


@pytest.mark.parametrize(
    ("bad", "match"),
    [(0.5, r"the fraction 0\.5.*log-normalised"), (-1, "negative value -1"), (np.nan, "NaN")],
)
@pytest.mark.parametrize("form", ["csr", "dense"])
def test_bad_values_are_found_as_in_memory(cells, tmp_path, small_buffers, bad, match, form):
    X = cells.X.astype(np.float64)
    X.data[-3] = bad
    with h5py.File(tmp_path / "bad.h5ad", "w") as file:
        write_elem(file, "X", X if form == "csr" else X.toarray())
        matrix = sparse_dataset(file["X"]) if form == "csr" else file["X"]
        with pytest.raises(ValueError, match=match):
            check_cells(matrix, "count")
        check_cells(matrix, "real") if not np.isnan(bad) else None


def test_disorder_and_duplicates_are_resolved(tmp_path):
    X = sparse.csr_matrix(([4.0, 1, 0.5, 0.5], [1, 0, 1, 1], [0, 2, 4]), shape=(2, 2))
    with h5py.File(tmp_path / "odd.h5ad", "w") as file:
        write_elem(file, "X", X)
        found = check_cells(sparse_dataset(file["X"]), "count")
        assert found[np.array([1, 0])].toarray().tolist() == [[0, 1], [1, 4]]


def _index_out_of_range(group):
    group["indices"][0] = 1000


def _pointer_backwards(group):
    group["indptr"][1] = 10_000


def _values_missing(group):
    group["data"].resize((10,))


@pytest.mark.parametrize("damage", [_index_out_of_range, _pointer_backwards, _values_missing])
def test_broken_index_arrays_are_named(cells, tmp_path, damage):
    with h5py.File(tmp_path / "broken.h5ad", "w") as file:
        write_elem(file, "X", cells.X)
        damage(file["X"])
        with pytest.raises(ValueError, match=r"well-formed CSR matrix.*rebuild the matrix"):
            check_cells(sparse_dataset(file["X"]), "count")


def test_a_damaged_chunk_names_the_file(cells, tmp_path):
    place = tmp_path / "damaged.h5ad"
    with h5py.File(place, "w") as file:
        write_elem(file, "X", cells.X, dataset_kwargs={"compression": "gzip"})
        chunk = file["X/data"].id.get_chunk_info(0)
    content = bytearray(place.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    place.write_bytes(content)
    with (
        h5py.File(place) as file,
        pytest.raises(UnreadableError, match=r"damaged\.h5ad: expected a complete file"),
    ):
        check_cells(sparse_dataset(file["X"]), "count")


def test_columns_on_disk_are_refused_by_the_model(cells, tmp_path):
    with h5py.File(tmp_path / "csc.h5ad", "w") as file:
        write_elem(file, "X", cells.X.tocsc())
        with pytest.raises(ValueError, match=r"by rows \(CSR or dense\); got CSC.*to_memory"):
            CFGen().fit(sparse_dataset(file["X"]), cells.labels)


def test_what_is_in_memory_is_not_on_disk(cells):
    for X in (cells.X, cells.X.toarray(), [[1]], None, "X"):
        assert as_stored(X) is None


# ------------------------------------------------------------------- shuffling


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(4, 400),
    share=st.floats(0.05, 1.0),
    buffer=st.integers(1, 300),
    run=st.integers(1, 40),
)
def test_an_epoch_has_every_row_once_and_no_group_of_one(n, share, buffer, run):
    X = StoredCells(_Array(np.arange(2.0 * n).reshape(n, 2)))
    chosen = np.random.default_rng(0).random(n) < share
    chosen[:2] = True
    rows = np.flatnonzero(chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "_BUFFER_VALUES", buffer)
        patch.setattr(stored, "_CHUNK_ROWS", run)
        random = np.random.default_rng(1)
        for _ in range(2):
            groups = []
            for group in buffers(X, rows, random):
                assert len(group) >= 2
                np.testing.assert_array_equal(X[group[::-1]][:, 0], 2.0 * group[::-1])
                groups.append(group)
            np.testing.assert_array_equal(np.sort(np.concatenate(groups)), rows)


class _Array:
    """A dense array on disk that counts what is read."""

    chunks = None

    def __init__(self, values):
        self.values = values
        self.shape, self.dtype = values.shape, values.dtype
        self.read = 0

    def __getitem__(self, rows):
        self.read += len(self.values[rows])
        return self.values[rows]


def test_epochs_differ_seeds_repeat_and_runs_mix(small_buffers):
    X = StoredCells(_Array(np.zeros((400, 6))))
    rows = np.arange(400)

    def order(random):
        return [group.tolist() for group in buffers(X, rows, random)]

    random = np.random.default_rng(0)
    first, second = order(random), order(random)
    assert first != second
    assert order(np.random.default_rng(0)) == first
    assert len(first) == 4
    # A buffer gathers runs from all over the file, which may be sorted by type.
    assert all(min(group) < 130 and max(group) > 270 for group in first)


def test_an_epoch_reads_every_row_once_and_held_out_rows_only_before(small_buffers):
    array = _Array(np.zeros((400, 6)))
    held_out, rows = np.arange(0, 400, 10), np.setdiff1d(np.arange(400), np.arange(0, 400, 10))
    X = keep(StoredCells(array), held_out)
    before = array.read
    for group in buffers(X, rows, np.random.default_rng(0)):
        X[group[:3]]
    assert array.read - before <= 400
    before = array.read
    X[held_out]
    X[held_out[5:9]]
    assert array.read == before


def test_what_fits_a_buffer_is_read_once_and_shuffled_as_in_memory(cells):
    array = _Array(cells.X.toarray())
    X, rows = StoredCells(array), np.arange(0, 150, 2)
    left, right = np.random.default_rng(0), np.random.default_rng(0)
    for _ in range(3):
        assert [g.tolist() for g in buffers(X, rows, left)] == [rows.tolist()]
        assert [g.tolist() for g in buffers(cells.X, rows, right)] == [rows.tolist()]
    assert left.bit_generator.state == right.bit_generator.state
    assert array.read <= 150


def test_stopping_in_the_middle_of_an_epoch_leaves_no_reader_behind(small_buffers):
    reading = buffers(StoredCells(_Array(np.zeros((400, 6)))), np.arange(400), _random())
    next(reading)
    reading.close()
    with pytest.raises(StopIteration):
        next(reading)


def _random():
    return np.random.default_rng(0)


# -------------------------------------------------------------------- the doors


def small(**options):
    return CFGen(n_latent=4, max_epochs=2, random_state=0, device="cpu", **options)


def same(a, b):
    return a.dtype == b.dtype and np.array_equal(dense(a), dense(b))


@pytest.mark.parametrize("dispersion", ["gene", "gene-label"])
def test_small_files_train_the_same_model_as_memory(on_disk, cells, dispersion):
    X = cells.X.astype(np.float32)
    left = small(dispersion=dispersion).fit(on_disk, cells.labels)
    right = small(dispersion=dispersion).fit(X, cells.labels)
    assert same(left.generate(cells.labels), right.generate(cells.labels))
    np.testing.assert_array_equal(left.encode(on_disk), right.encode(X))


def test_larger_files_train_as_well_and_the_same_twice(on_disk, cells, small_buffers):
    options = {"n_latent": 4, "max_epochs": 20, "batch_size": 15, "random_state": 0}
    first, again, memory = (
        CFGen(**options, device="cpu").fit(X, cells.labels)
        for X in (on_disk, on_disk, cells.X.astype(np.float32))
    )
    assert same(first.generate(cells.labels), again.generate(cells.labels))
    assert first.history_["autoencoder"].validation[-1] == pytest.approx(
        memory.history_["autoencoder"].validation[-1], rel=0.03
    )
    np.testing.assert_allclose(first.encode(on_disk), first.encode(cells.X), atol=1e-5)


@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_never_more_than_a_block_in_dense_form(
    on_disk, cells, small_buffers, monkeypatch, fraction
):
    asked = []
    original = dense_rows

    def watched(X, rows):
        block = original(X, rows)
        asked.append(len(block))
        return block

    monkeypatch.setattr("cfgen_augment.stages.dense_rows", watched)
    monkeypatch.setattr("cfgen_augment.stages._BLOCK_VALUES", 1)
    monkeypatch.setattr("cfgen_augment.stages._FEWEST_ROWS", 32)
    small(batch_size=16, validation_fraction=fraction).fit(on_disk, cells.labels)
    assert 0 < max(asked) <= 32


def test_never_more_than_a_buffer_is_read(on_disk, cells, small_buffers, monkeypatch):
    blocks = []
    original = StoredCells.read

    def watched(self, start, stop):
        blocks.append(stop - start)
        return original(self, start, stop)

    monkeypatch.setattr(StoredCells, "read", watched)
    monkeypatch.setattr("cfgen_augment.counts._SCAN", 600)
    monkeypatch.setattr("cfgen_augment.stages._BLOCK_VALUES", 1)
    monkeypatch.setattr("cfgen_augment.stages._FEWEST_ROWS", 32)
    small(batch_size=16).fit(on_disk, cells.labels)
    assert 0 < max(blocks) <= 32


@pytest.fixture
def backed(cells, tmp_path):
    made = anndata.AnnData(cells.X.astype(np.float32), obs={"cell_type": cells.labels})
    made.obs_names = [f"cell{i}" for i in range(150)]
    made.write_h5ad(tmp_path / "cells.h5ad")
    adata = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    yield adata
    adata.file.close()


def test_backed_anndata_give_what_memory_gives(backed, monkeypatch):
    options = {"max_epochs": 2, "random_state": 0, "device": "cpu"}
    expected = augment(backed.to_memory(), "cell_type", **options)
    sampled, _ = CFGenSampler(**options).fit_resample(
        backed.to_memory(), backed.obs["cell_type"].astype(str)
    )
    trained = []
    fit, to_memory = CFGen.fit, StoredCells.to_memory

    def watched_fit(self, *arguments, **named):
        trained.append(fit(self, *arguments, **named))
        return trained[-1]

    def watched_read(self):
        assert trained.pop()  # the result is in memory, so its real cells must be in the end
        return to_memory(self)

    monkeypatch.setattr(CFGen, "fit", watched_fit)
    monkeypatch.setattr(StoredCells, "to_memory", watched_read)
    result = augment(backed, "cell_type", **options)
    assert same(result.X, expected.X)
    resampled, _ = CFGenSampler(**options).fit_resample(backed, backed.obs["cell_type"].astype(str))
    assert same(resampled.X, sampled.X)

    assert not trained
