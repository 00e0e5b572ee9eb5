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


def test_a_split_deals_out_every_molecule_once(X):
    whole = Minibatch.of(X, np.arange(40), "count", CPU)
    seen, rest = whole.split(torch.Generator().manual_seed(0))
    for part in (seen, rest):
        assert (part.values >= 0).all()
        assert (part.values == part.values.round()).all()
    assert torch.equal(seen.dense() + rest.dense(), whole.dense())
    again, _ = whole.split(torch.Generator().manual_seed(0))
    assert torch.equal(again.values, seen.values)
    totals = torch.as_tensor(rest.dense().sum(dim=1, keepdim=True))
    torch.testing.assert_close(rest.log_totals(), totals.clamp_min(1).log())


def test_parts_of_poisson_counts_are_independent_given_the_share():
    random = np.random.default_rng(0)
    counts = sparse.csr_matrix(random.poisson(6.0, size=(400, 300)))
    whole = Minibatch.of(counts, np.arange(400), "count", CPU)
    seen, rest = (part.dense() for part in whole.split(torch.Generator().manual_seed(1)))
    share = seen.sum(dim=1) / (seen.sum(dim=1) + rest.sum(dim=1))
    # Uniform on [.3, .9], give or take the counting noise of 1,800 molecules.
    assert share.mean() == pytest.approx(0.6, abs=0.04)
    assert share.min() == pytest.approx(0.3, abs=0.03)
    assert share.max() == pytest.approx(0.9, abs=0.03)
    within = [np.corrcoef(a, b)[0, 1] for a, b in zip(seen.numpy(), rest.numpy(), strict=True)]
    assert np.mean(within) == pytest.approx(0.0, abs=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_resident_cells_on_a_gpu(X):
    rows = np.array([3, 39, 0, 5])
    made = ResidentCells(X, torch.device("cuda"))(rows)
    assert made.values.device.type == "cuda"
    np.testing.assert_array_equal(made.dense().cpu().numpy(), X[rows].toarray())
