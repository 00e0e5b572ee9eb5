"""Minibatches put together on a device against those moved to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from cfgen_augment import minibatch
from cfgen_augment.minibatch import Minibatch, ResidentCells, supply

CPU = torch.device("cpu")


@pytest.fixture
def X():
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.4, size=(40, 17)) * rng.integers(1, 9, size=(40, 1))
    counts[5] = 0
    X = sparse.csr_matrix(counts)
    X.data[::7] = 0  # stored zeros, and an empty cell
    return X


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(np.array([3, 39, 0, 5, 5, 12]), id="any order, repeated, empty"),
        pytest.param(np.array([5]), id="nothing at all"),
        pytest.param(np.arange(40), id="all"),
    ],
)
def test_resident_cells_give_the_minibatches_that_are_moved(X, rows):
    moved = Minibatch.of(X, rows, "count", CPU)
    resident = ResidentCells(X, CPU)(rows)
    assert resident.shape == moved.shape
    assert torch.equal(resident.at, moved.at)
    assert torch.equal(resident.values, moved.values)
    assert torch.equal(resident.dense(), torch.as_tensor(X[rows].toarray(), dtype=torch.float32))


def test_resident_cells_leave_the_matrix_as_it_was(X):
    before = X.copy()
    ResidentCells(X, CPU)
    assert X.nnz == before.nnz
    np.testing.assert_array_equal(X.data, before.data)


@pytest.mark.parametrize(
    ("free", "kind", "resident"),
    [(10**9, "count", True), (100, "count", False), (10**9, "real", False)],
)
def test_counts_live_on_a_gpu_only_if_they_fit(X, monkeypatch, free, kind, resident):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    monkeypatch.setattr(minibatch.ResidentCells, "__init__", lambda self, X, device: None)
    made = supply(X, kind, torch.device("cuda", 0))
    assert isinstance(made, ResidentCells) == resident


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_resident_cells_on_a_gpu(X):
    rows = np.array([3, 39, 0, 5])
    made = ResidentCells(X, torch.device("cuda"))(rows)
    assert made.values.device.type == "cuda"
    np.testing.assert_array_equal(made.dense().cpu().numpy(), X[rows].toarray())
