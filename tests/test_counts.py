"""What cell matrices are accepted, what is said about the others, and rows, moments, casts."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from cfgen_augment import counts
from cfgen_augment.counts import (
    append_rows,
    as_dtype,
    check_cells,
    dense_rows,
    feature_moments,
    total_counts,
)

COUNTS = np.array([[0, 3, 0], [1, 0, 0], [0, 0, 0], [2, 5, 7]])
CONTAINERS = {
    "ndarray": np.asarray,
    "fortran": np.asfortranarray,
    "strided": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "csr_matrix": sparse.csr_matrix,
    "csr_array": sparse.csr_array,
    "csc_matrix": sparse.csc_matrix,
    "csc_array": sparse.csc_array,
    "coo_array": sparse.coo_array,
}
containers = pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)


def dense(X):
    return X.toarray() if sparse.issparse(X) else X


@containers
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "int64", "float16", "float64"])
def test_containers_and_dtypes_keep_their_values(container, dtype):
    if dtype == "float16" and sparse.issparse(container(COUNTS)):
        dtype = "float32"  # SciPy has no sparse float16
    given = container(COUNTS.astype(dtype))
    checked = check_cells(given, "count")
    assert checked.dtype == dtype
    np.testing.assert_array_equal(dense(checked), COUNTS.astype(dtype))
    if sparse.issparse(given):
        assert checked.format == "csr"
        assert checked.has_canonical_format
        assert isinstance(checked, sparse.sparray) == isinstance(given, sparse.sparray)


@pytest.mark.parametrize("container", [np.asarray, sparse.csr_matrix], ids=["ndarray", "csr"])
def test_canonical_input_is_not_copied(container):
    X = container(COUNTS)
    checked = check_cells(X, "count")
    values, given = (checked.data, X.data) if sparse.issparse(X) else (checked, X)
    assert np.shares_memory(values, given)


@pytest.mark.parametrize("make", [sparse.csr_matrix, sparse.csc_matrix], ids=["csr", "csc"])
def test_duplicates_and_disorder_are_resolved_in_a_copy(make):
    data, indices, indptr = [4, 1, 2, 5], [1, 0, 1, 0], [0, 3, 4]
    X = make((data, indices, indptr), shape=(2, 2))
    checked = check_cells(X, "count")
    assert checked.has_canonical_format
    np.testing.assert_array_equal(checked.toarray(), X.toarray())
    assert X.data.tolist() == data
    assert X.indices.tolist() == indices
    assert X.indptr.tolist() == indptr


def test_duplicates_are_summed_before_values_are_checked():
    X = sparse.csr_matrix(([0.5, 0.5], [1, 1], [0, 2]), shape=(1, 2))
    assert check_cells(X, "count").toarray().tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("kind", "bad", "match"),
    [
        pytest.param("count", np.nan, r"counts: expected raw .*contains NaN", id="nan"),
        pytest.param("count", np.inf, r"Input contains infinity", id="inf"),
        pytest.param("count", -np.inf, r"Input contains infinity", id="minus-inf"),
        pytest.param("count", -1.5, r"negative value -1\.5.*layer='counts'", id="negative"),
        pytest.param("count", 0.69, r"fraction 0\.69.*log-normalised.*layer='counts'", id="log"),
        pytest.param("binary", 2.0, r"zeros and ones .*got 2\. Binarise", id="not-binary"),
        pytest.param("binary", 0.5, r"zeros and ones .*got 0\.5", id="half"),
        pytest.param("binary", -1.0, r"zeros and ones; got the negative value -1", id="minus-one"),
        pytest.param("real", np.nan, r"finite numbers; Input contains NaN", id="real-nan"),
        pytest.param("real", np.inf, r"finite numbers; Input contains infinity", id="real-inf"),
    ],
)
@containers
def test_bad_values(container, kind, bad, match):
    values = (COUNTS > 0).astype(float)
    values[3, 1] = bad
    with pytest.raises(ValueError, match=match):
        check_cells(container(values), kind, name="counts")


@pytest.mark.parametrize("container", [np.asarray, sparse.csr_matrix], ids=["ndarray", "csr"])
@pytest.mark.parametrize("at", [0, 1, 6, 7, 13, 14, -1])
def test_every_block_of_the_scan_is_read(container, at, monkeypatch):
    monkeypatch.setattr(counts, "_SCAN", 7)
    values = np.ones((10, 3))
    check_cells(container(values), "count")
    values.reshape(-1)[at] = 1.5
    with pytest.raises(ValueError, match=r"fraction 1\.5"):
        check_cells(container(values), "count")


def test_one_bad_value_deep_in_a_large_matrix_is_found():
    n_genes = 2048
    n_cells = counts._SCAN // n_genes + 5  # the last rows lie in the second block
    X = sparse.csr_matrix(np.ones((n_cells, n_genes), dtype=np.float32))
    check_cells(X, "count")
    X.data[-3] = 0.25
    with pytest.raises(ValueError, match=r"fraction 0\.25"):
        check_cells(X, "count")


@pytest.mark.parametrize(
    ("X", "match"),
    [
        pytest.param(np.array([[1, -2]]), r"negative value -2", id="integers-too"),
        pytest.param(np.zeros(3), r"two dimensions .*got shape \(3,\)", id="vector"),
        pytest.param(sparse.coo_array([1, 2]), r"two dimensions .*got shape", id="sparse-vector"),
        pytest.param(np.zeros((2, 2, 2)), r"two dimensions", id="cube"),
        pytest.param(np.zeros((3, 0)), r"0 feature\(s\)", id="no-features"),
        pytest.param(np.zeros((0, 3)), r"0 sample\(s\)", id="no-cells"),
        pytest.param(sparse.csr_matrix((0, 3)), r"0 sample\(s\)", id="no-cells-csr"),
    ],
)
def test_bad_shapes_and_integers(X, match):
    with pytest.raises(ValueError, match=match):
        check_cells(X, "count")


def test_too_few_cells_for_the_caller():
    with pytest.raises(ValueError, match=r"at least 2 cell\(s\).*1 sample\(s\)"):
        check_cells(np.ones((1, 3)), "count", n_min=2)


@pytest.mark.parametrize(
    ("X", "match"),
    [
        pytest.param([[1, 2]], r"a NumPy array .*got list", id="list"),
        pytest.param(np.array([["a"]]), r"expected numbers; got dtype <U1", id="strings"),
        pytest.param(np.array([[1, None]]), r"expected numbers; got dtype object", id="objects"),
        pytest.param(np.ones((1, 1), dtype=complex), r"got dtype complex128", id="complex"),
    ],
)
def test_bad_types(X, match):
    with pytest.raises(TypeError, match=match):
        check_cells(X, "count")


def _broken(make, part, at, value):
    X = make(COUNTS)
    getattr(X, part)[at] = value
    return X


@pytest.mark.parametrize("make", [sparse.csr_matrix, sparse.csc_array], ids=["csr", "csc"])
@pytest.mark.parametrize(
    ("part", "at", "value"),
    [
        pytest.param("indices", 2, 99, id="index-too-large"),
        pytest.param("indices", 0, -1, id="index-negative"),
        pytest.param("indptr", 1, 5, id="pointers-decrease"),
        pytest.param("indptr", 0, 1, id="pointers-do-not-start-at-zero"),
        pytest.param("indptr", -1, 50, id="pointers-past-the-end"),
    ],
)
def test_broken_index_arrays(make, part, at, value):
    with pytest.raises(ValueError, match=r"well-formed CS[RC] matrix.*rebuild the matrix"):
        check_cells(_broken(make, part, at, value), "count")


def test_values_of_any_sign_pass_as_real_and_zeros_and_ones_as_binary():
    real = np.array([[-1.5, 2.25]])
    np.testing.assert_array_equal(check_cells(real, "real"), real)
    binary = sparse.csr_matrix(COUNTS > 0)
    assert check_cells(binary, "binary") is not None
    assert check_cells(binary.astype(float), "binary").sum() == 5


@pytest.mark.parametrize("rows", [slice(1, 9), np.array([3, 0, 3])], ids=["slice", "index"])
@pytest.mark.parametrize("container", [np.asarray, sparse.csr_matrix], ids=["ndarray", "csr"])
def test_dense_rows(container, rows):
    block = dense_rows(container(COUNTS), rows)
    assert block.dtype == np.float32
    assert block.flags.c_contiguous
    np.testing.assert_array_equal(block, COUNTS[rows])


@pytest.mark.parametrize(
    "container", [np.asarray, sparse.csr_matrix, sparse.csr_array], ids=["ndarray", "csr", "array"]
)
def test_total_counts(container):
    np.testing.assert_array_equal(total_counts(container(COUNTS)), [3, 1, 1, 14])
    narrow = container(np.full((1, 3), 200, dtype=np.uint8))
    assert total_counts(narrow).tolist() == [600.0]


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
@pytest.mark.parametrize("container", [np.asarray, sparse.csr_matrix], ids=["ndarray", "csr"])
def test_feature_moments_agree_with_numpy(container, block, monkeypatch):
    monkeypatch.setattr(counts, "_SCAN", block)
    rng = np.random.default_rng(0)
    X = rng.poisson(rng.gamma(1.0, 5.0, size=6), size=(64, 6)).astype(float)
    X[:, 0] = 3.0
    mean, variance = feature_moments(container(X))
    np.testing.assert_allclose(mean, X.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(variance, X.var(axis=0), rtol=1e-10, atol=1e-12)
    assert variance[0] == 0.0


def test_feature_moments_survive_an_offset_far_larger_than_the_spread():
    # float32 holds these values exactly; E[x^2] - E[x]^2 in float64 would lose the digits.
    X = 2.0**23 + np.tile([[0.0], [1.0]], (50, 1))
    mean, variance = feature_moments(X)
    assert mean[0] == 2.0**23 + 0.5
    assert variance[0] == 0.25


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [("uint8", 255), ("int8", 127), ("int16", 2**15 - 1), ("float16", 2048), ("bool", 1)],
)
@pytest.mark.parametrize("container", [np.asarray, sparse.csr_matrix], ids=["ndarray", "csr"])
def test_as_dtype_holds_what_does_not_fit(container, dtype, limit):
    drawn = np.array([[0, 1, limit], [limit + 1, 100_000, 0]], dtype=np.int32)
    given = container(drawn)
    cast, held = as_dtype(given, np.dtype(dtype))
    assert held == 2
    assert cast.dtype == ("float32" if dtype == "float16" and sparse.issparse(cast) else dtype)
    np.testing.assert_array_equal(dense(cast).astype(int), np.minimum(drawn, limit))
    np.testing.assert_array_equal(dense(given), drawn)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint64", "float32", "float64"])
def test_as_dtype_leaves_what_fits(dtype):
    cast, held = as_dtype(sparse.csr_matrix(COUNTS.astype(np.int32)), np.dtype(dtype))
    assert (held, cast.dtype) == (0, dtype)
    np.testing.assert_array_equal(cast.toarray(), COUNTS)


@containers
def test_append_rows_keeps_container_format_and_dtype(container):
    cells = container(COUNTS.astype(np.float32))
    new = sparse.csr_matrix([[0, 9, 0]], dtype=np.int32)
    both = append_rows(cells, new)
    assert type(both) is type(cells)
    assert both.dtype == np.float32
    np.testing.assert_array_equal(dense(both), [*COUNTS.tolist(), [0, 9, 0]])
    np.testing.assert_array_equal(dense(append_rows(cells, new.toarray())), dense(both))


@pytest.mark.parametrize("container", [np.asarray, sparse.csc_array], ids=["ndarray", "csc"])
def test_continuous_rows_join_whole_numbers_rounded_and_within_range(container):
    new = np.array([[0.4, -1.6, 1e6]])
    both = append_rows(container(COUNTS.astype(np.int8)), new)
    assert both.dtype == np.int8
    assert dense(both)[-1].tolist() == [0, -2, 127]
    assert new.tolist() == [[0.4, -1.6, 1e6]]
