"""The training benchmark: what it calls the floor, its recipes, and its command."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed import training_curve
from benchmarks.speed.floor import training_products
from benchmarks.speed.training_curve import Problem, curve, trained_as
from cfgen_augment import stages, training
from cfgen_augment.likelihoods import Likelihood, NegativeBinomial
from cfgen_augment.training import Schedule


def problem(n=120, n_genes=12) -> Problem:
    rng = np.random.default_rng(0)
    X = sparse.csr_matrix(rng.poisson(rng.gamma(0.5, 2.0, size=(n, n_genes))))
    return Problem.of(X, np.repeat([0, 1], n // 2))


class Products(TorchDispatchMode):
    """Shapes of the matrix products that are made."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            self.shapes.append((*args[-2].shape, args[-1].shape[1]))
        return func(*args, **(kwargs or {}))


def test_the_floor_makes_the_products_of_a_step_and_no_others():
    module = nn.Sequential(nn.Linear(7, 5), nn.ELU(), nn.Linear(5, 3), nn.ELU(), nn.Linear(3, 2))
    x = torch.randn(11, 7)
    products = training_products(module, lambda: module(x))
    with Products() as floor:
        products()
    with Products() as step:
        module(x).square().sum().backward()
    assert len(floor.shapes) == 8  # three a layer, but none for the gradient of the input
    assert sorted(floor.shapes) == sorted(step.shapes)


def test_the_reference_recipe_is_in_place_only_while_it_is_asked_for():
    fast, step = NegativeBinomial.loss, training.descend
    with trained_as("reference"):
        assert NegativeBinomial.loss is Likelihood.loss
        assert training.descend is not step
        assert training.annealed(5, 6) == 1.0
    assert NegativeBinomial.loss is fast
    assert training.descend is step
    assert training.annealed(5, 6) < 0.1


@pytest.mark.parametrize("recipe", training_curve.RECIPES)
def test_curves_have_a_row_for_every_epoch(recipe):
    table = curve(problem(), recipe, Schedule(1e-3, 4, 60, 9), seed=0)
    assert table["steps"].tolist() == [2, 4, 6, 8]
    assert (table["CPU s"].diff().dropna() > 0).all()
    assert np.isfinite(table["held-out"]).all()


def test_both_recipes_minimise_the_same_loss(monkeypatch):
    # Before their first steps differ the held-out losses agree: same weights, same density.
    monkeypatch.setattr(stages, "_NOISE_RATE", 1e-12)
    present, reference = (
        curve(problem(), recipe, Schedule(1e-12, 1, 60, 9), seed=0)["held-out"].iloc[0]
        for recipe in training_curve.RECIPES
    )
    assert present == pytest.approx(reference, rel=1e-5)


def test_the_command_prints_its_tables(tmp_path, monkeypatch, capsys):
    made = problem()
    adata = anndata.AnnData(made.X.astype(np.float32))
    adata.obs["cell_type"] = np.where(made.labels == 0, "a", "b")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    options = ["--cells", "80", "--rounds", "1", "--seeds", "1", "--reference-epochs", "3"]
    path = str(tmp_path / "cells.h5ad")
    monkeypatch.setattr("sys.argv", ["training_curve", "--data", path, *options])
    training_curve.main()
    printed = capsys.readouterr().out
    for word in ("products ms", "held-out", "80 cells of cells.h5ad", "present", "reference"):
        assert word in printed
