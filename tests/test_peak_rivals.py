"""PeakVI, MultiVI, and scVI trained once and asked twice: types, depths, seeds."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from scipy import sparse

from benchmarks.cells import Cells, Training
from benchmarks.rivals import peaks
from benchmarks.rivals import scvi as scvi_rival

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("scvi") is None or importlib.util.find_spec("mudata") is None,
    reason="needs scvi-tools and mudata, a benchmark extra: pip install scvi-tools mudata",
)

WANTED = {"B": 60, "T": 40}


@pytest.fixture(scope="module")
def cells():
    """Genes and peaks, of which each type has some of its own."""
    random = np.random.default_rng(0)
    labels = np.repeat(["B", "T"], 150)
    rates, shares = np.full((300, 40), 1.0), np.full((300, 80), 0.05)
    for i, name in enumerate(["B", "T"]):
        rates[labels == name, 10 * i : 10 * i + 10] = 6.0
        shares[labels == name, 20 * i : 20 * i + 20] = 0.5
    genes = sparse.csr_matrix(random.poisson(rates).astype(np.float32))
    return (
        genes,
        sparse.csr_matrix((random.random(shares.shape) < shares).astype(np.float32)),
        labels,
    )


@pytest.fixture(scope="module")
def fitted(cells):
    genes, opened, labels = cells
    return {
        "peakvi": peaks.fit_peakvi(opened, labels, 0, 200),
        "multivi": peaks.fit_multivi(genes, opened, labels, 0, 200),
    }


@pytest.mark.parametrize("latents", ["posterior", "prior"])
@pytest.mark.parametrize("name", ["peakvi", "multivi"])
def test_makes_cells_of_the_types_wanted(fitted, cells, name, latents):
    genes, opened, labels = cells
    made = peaks.draw(fitted[name], WANTED, latents, 0)
    assert set(made) == ({"atac"} if name == "peakvi" else {"rna", "atac"})
    assert set(np.unique(made["atac"].data)) == {1.0}
    types = np.repeat(list(WANTED), list(WANTED.values()))
    for modality, values in made.items():
        real = opened if modality == "atac" else genes
        assert values.shape == (100, real.shape[1])
        if modality == "atac":  # the encoder of total counts takes longer than this to be right
            assert values.mean() == pytest.approx(real.mean(), rel=0.15)
        for own in WANTED:
            mean = np.asarray(values[types == own].mean(axis=0)).ravel()
            match = {
                other: np.corrcoef(mean, np.asarray(real[labels == other].mean(axis=0)))[0, 1]
                for other in WANTED
            }
            other = next(t for t in WANTED if t != own)
            assert match[own] > max(0.7, match[other] + 0.3), (modality, match)


@pytest.mark.parametrize("name", ["peakvi", "multivi"])
def test_is_a_function_of_its_seed_and_leaves_global_states_alone(fitted, cells, name):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = (
        peaks.draw(fitted[name], WANTED, "posterior", seed)["atac"] for seed in (0, 0, 1)
    )
    assert (first != again).nnz == 0
    assert (first != other).nnz > 0
    _, opened, labels = cells
    trained = [peaks.fit_peakvi(opened, labels, 3, 1) for _ in range(2)]
    a, b = (peaks.draw(model, WANTED, "prior", 0)["atac"] for model in trained)
    assert (a != b).nnz == 0
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_epochs_make_up_a_number_of_steps():
    assert peaks.epochs(200) == 500  # never more than scvi-tools' own default
    assert peaks.epochs(1_849) == 200
    assert peaks.epochs(10**7) == 1


def test_latents_are_checked(fitted):
    with pytest.raises(ValueError, match="'posterior' or 'prior'"):
        peaks.draw(fitted["peakvi"], WANTED, "mean", 0)


def test_scvi_trained_once_makes_what_it_makes_alone(cells):
    genes, _, labels = cells
    known = Cells(genes, labels, np.array([f"g{i}" for i in range(40)]))
    training = Training(known, known.take(np.arange(0)), WANTED, 0)
    module = scvi_rival.fit(training, max_epochs=150)
    for latents in ("posterior", "prior"):
        new = scvi_rival.draw(training, module, latents)
        again = scvi_rival.draw(training, module, latents)
        assert (new.values != again.values).nnz == 0
        assert new.labels.tolist() == np.repeat(["B", "T"], [60, 40]).tolist()
        mean = np.asarray(new.values[:60].mean(axis=0)).ravel()
        own = np.asarray(genes[labels == "B"].mean(axis=0)).ravel()
        assert np.corrcoef(mean, own)[0, 1] > 0.9
