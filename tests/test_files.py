"""From file to file: what is written is what memory would give, complete or not at all."""

from __future__ import annotations

import os
import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cfgen_augment import CFGen, augment, augment_file, files, stored, writing
from cfgen_augment.stored import StoredCells, UnreadableError

pytest.importorskip("zarr")
pytestmark = pytest.mark.filterwarnings("ignore:Dropped what does not hold:UserWarning")


@pytest.fixture(scope="module")
def model(cells):
    return CFGen(n_latent=4, max_epochs=1, random_state=0, device="cpu").fit(
        cells.X, cells.labels, covariates={"donor": cells.donors}
    )


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of some 32 generated and ten real cells, and a write for every few of them."""
    monkeypatch.setattr("cfgen_augment.stages._BLOCK_VALUES", 1)
    monkeypatch.setattr("cfgen_augment.stages._FEWEST_ROWS", 32)
    monkeypatch.setattr(writing, "_WRITTEN_VALUES", 1000)
    monkeypatch.setattr(stored, "_BUFFER_VALUES", 600)
    monkeypatch.setattr("cfgen_augment.annotated._COMPARED_VALUES", 600)
    monkeypatch.setattr("cfgen_augment.counts._SCAN", 600)


def write(adata, file):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Writing zarr v2", UserWarning)
        adata.write_zarr(file) if file.suffix == ".zarr" else adata.write_h5ad(file)
    return file


def read(file):
    return anndata.read_zarr(file) if file.suffix == ".zarr" else anndata.read_h5ad(file)


def dense(X):
    return X.toarray() if sparse.issparse(X) else np.asarray(X)


def assert_same(found, expected):
    """Equal in every slot, dtypes and containers included."""
    for table in ("obs", "var"):
        pd.testing.assert_frame_equal(getattr(found, table), getattr(expected, table))
    for left, right in [(found.X, expected.X)] + [
        (found.layers[key], expected.layers[key]) for key in expected.layers
    ]:
        assert type(left) is type(right)
        assert left.dtype == right.dtype
        if sparse.issparse(left):
            assert left.indptr.dtype == right.indptr.dtype
        np.testing.assert_array_equal(dense(left), dense(right))
    for slot in ("layers", "obsm", "obsp", "varm", "varp"):
        left, right = getattr(found, slot), getattr(expected, slot)
        assert set(left) == set(right)
        for key in right:
            np.testing.assert_array_equal(dense(left[key]), dense(right[key]))
    assert (found.raw is None) == (expected.raw is None)
    np.testing.assert_equal(dict(found.uns), dict(expected.uns))


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("container", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
@pytest.mark.parametrize("layer", [None, "counts"])
def test_the_file_is_what_memory_would_write(
    adata, model, tmp_path, small_blocks, suffix, container, layer
):
    adata.X = container(adata.X.toarray())
    if layer:
        adata.X = adata.X * np.float32(0.5)
        adata.layers["counts"] = container(adata.layers["counts"].toarray())
    options = {"donor_key": "donor", "layer": layer, "generator": model, "random_state": 0}
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    source = write(adata, source)
    with pytest.warns(UserWarning, match="Dropped") as expected_notes:
        expected = augment(read(source), "cell_type", target_size=700, **options)
    expected = read(write(expected, tmp_path / f"expected{suffix}"))
    with pytest.warns(UserWarning, match="Dropped") as notes:
        written = augment_file(source, target, "cell_type", target_size=700, **options)
    assert str(notes[0].message) == str(expected_notes[0].message)
    assert notes[0].filename == __file__
    found = read(target)
    assert_same(found, expected)
    assert written.X is None
    assert not written.layers
    assert written.n_obs == 700
    np.testing.assert_equal(dict(written.uns), dict(found.uns))
    pd.testing.assert_index_equal(written.obs_names, found.obs_names)


@pytest.mark.parametrize("dtype", [np.uint8, np.float64, np.int64])
def test_dtypes_and_formats_are_kept_across_stores(cells, tmp_path, small_blocks, dtype):
    made = anndata.AnnData(np.minimum(cells.X.toarray(), 9).astype(dtype))
    made.obs["cell_type"] = pd.Categorical(cells.labels)
    made.obs_names = [f"c{i}" for i in range(150)]
    source = write(made, tmp_path / "in.zarr")
    options = {"max_epochs": 1, "random_state": 0, "target_size": 300}
    augment_file(source, tmp_path / "out.h5ad", "cell_type", **options)
    found = read(tmp_path / "out.h5ad")
    assert isinstance(found.X, np.ndarray)
    assert found.X.dtype == dtype
    np.testing.assert_array_equal(found.X[:150], made.X)


def test_without_new_cells_the_file_holds_the_real_ones(adata, model, tmp_path):
    source = write(adata, tmp_path / "in.h5ad")
    augment_file(source, tmp_path / "out.h5ad", "cell_type", target_size=1.0, generator=model)
    found = read(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(dense(found.X), dense(adata.X))
    assert not found.obs["is_synthetic"].any()


def test_no_block_grows_with_the_cells(adata, model, tmp_path, small_blocks, monkeypatch):
    read_rows, drawn_rows, written_rows = [], [], []
    reading, generating, appending = (
        StoredCells.read,
        CFGen._generate_block,
        writing._Growing.append,
    )
    monkeypatch.setattr(
        StoredCells,
        "read",
        lambda self, start, stop: read_rows.append(stop - start) or reading(self, start, stop),
    )
    monkeypatch.setattr(
        CFGen,
        "_generate_block",
        lambda self, codes, *rest: drawn_rows.append(len(codes)) or generating(self, codes, *rest),
    )
    monkeypatch.setattr(
        writing._Growing,
        "append",
        lambda self, block: written_rows.append(block.shape[0]) or appending(self, block),
    )
    source = write(adata, tmp_path / "in.h5ad")
    augment_file(source, tmp_path / "out.h5ad", "cell_type", generator=model, target_size=2_000)
    assert sum(drawn_rows) == 1_850
    assert max(drawn_rows) <= 32
    assert max(read_rows) <= 600 // (adata.X.nnz // 150) + 1
    assert max(written_rows) <= 2 * 1_000 // (adata.X.nnz // 150)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("exists", [True, False], ids=["over-previous", "new"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing_behind(
    adata, model, tmp_path, small_blocks, monkeypatch, suffix, exists, error
):
    source, target = write(adata, tmp_path / "in.h5ad"), tmp_path / f"out{suffix}"
    if exists:
        augment_file(source, target, "cell_type", generator=model, target_size=200)
    before = sorted(tmp_path.rglob("*"))
    appends = []
    original = writing._Growing.append

    def fail(self, block):
        appends.append(block)
        if len(appends) == 4:
            raise error
        original(self, block)

    monkeypatch.setattr(writing._Growing, "append", fail)
    with pytest.raises(type(error)) as caught:
        augment_file(
            source, target, "cell_type", generator=model, target_size=700, overwrite=exists
        )
    assert len(appends) == 4
    if isinstance(error, OSError):
        assert str(caught.value) == f"{target.resolve()}: could not be written (no space left)."
    assert sorted(tmp_path.rglob("*")) == before
    if exists:
        assert read(target).n_obs == 200


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_what_exists_is_replaced_only_if_asked(adata, model, tmp_path, suffix):
    (tmp_path / "elsewhere").mkdir()
    source = write(adata, tmp_path / "in.h5ad")
    target, link = tmp_path / "elsewhere" / f"real{suffix}", tmp_path / f"out{suffix}"
    augment_file(source, target, "cell_type", generator=model, target_size=160)
    link.symlink_to(target)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        augment_file(tmp_path / "absent.h5ad", link, "cell_type")
    augment_file(source, link, "cell_type", generator=model, target_size=170, overwrite=True)
    assert link.is_symlink()
    assert read(target).n_obs == 170
    assert len(os.listdir(tmp_path / "elsewhere")) == 1


def test_the_input_itself_can_be_replaced(adata, model, tmp_path):
    source = write(adata, tmp_path / "in.zarr")
    augment_file(source, source, "cell_type", generator=model, target_size=160, overwrite=True)
    assert read(source).n_obs == 160
    assert os.listdir(tmp_path) == ["in.zarr"]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("out.h5", r"ends in \.h5ad, \.h5mu or \.zarr.*it ends in '\.h5'\. Rename"),
        ("out", r"ends in ''"),
        ("absent/out.zarr", "a directory that can be written to"),
        ("folder.h5ad", "expected a file name; it is a directory"),
        ("folder.zarr", "never overwritten"),
    ],
)
def test_places_that_cannot_hold_the_output(tmp_path, name, match):
    for folder in ("folder.h5ad", "folder.zarr"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "thesis.txt").write_text("dear")
    with pytest.raises(ValueError, match=match):
        augment_file("absent.h5ad", tmp_path / name, "cell_type", overwrite=True)
    assert (tmp_path / "folder.zarr" / "thesis.txt").read_text() == "dear"


@pytest.mark.parametrize("name", ["absent.h5ad", "absent.zarr"])
def test_absent_input(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        augment_file(tmp_path / name, tmp_path / "out.h5ad", "cell_type")
    assert not os.listdir(tmp_path)


def test_damaged_cells_name_the_input(adata, model, tmp_path):
    source = tmp_path / "in.h5ad"
    adata.write_h5ad(source, compression="gzip")
    with h5py.File(source) as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    content = bytearray(source.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    source.write_bytes(content)
    with pytest.raises(UnreadableError, match=r"in\.h5ad: expected a complete file"):
        augment_file(source, tmp_path / "out.h5ad", "cell_type", generator=model)
    assert os.listdir(tmp_path) == ["in.h5ad"]


def test_opening_reads_no_matrix_and_keeps_every_name(adata, tmp_path):
    adata.obsm["table"] = adata.obs[["integer"]].copy()
    for file in (write(adata, tmp_path / "in.h5ad"), write(adata, tmp_path / "in.zarr")):
        with files.opened(file) as lazy:
            for matrix in (
                lazy.X,
                *lazy.layers.values(),
                lazy.obsm["X_pca"],
                lazy.obsp["connectivities"],
            ):
                assert not isinstance(matrix, np.ndarray)
                assert not sparse.issparse(matrix)
            assert lazy.raw is not None
            assert set(lazy.obsm) == {"X_pca", "table"}
            assert set(lazy.uns) == set(adata.uns)
            pd.testing.assert_frame_equal(lazy.obs, read(file).obs)


def test_generated_blocks_are_what_generate_returns(cells, model):
    labels = np.repeat(["B", "T"], [1_500, 700])
    whole = model.generate(labels, random_state=3)
    blocks = list(model.generate_blocks(labels, random_state=3))
    assert [block.shape[0] for block in blocks] == [1024, 1024, 152]
    assert (sparse.vstack(blocks) != whole).nnz == 0
    assert [block.shape for block in model.generate_blocks([])] == [(0, 40)]


def test_blocks_are_checked_before_the_first_is_asked_for(model):
    with pytest.raises(ValueError, match="values seen in training"):
        model.generate_blocks(["unheard of"])
