"""Order by regression, agreement of the adaptive solver, and errors."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import torch

from cfgen_augment.solver import (
    SOLVERS,
    TABLEAUS,
    Tableau,
    check_solver,
    fit_multistep,
    make_solver,
)

Z = torch.tensor([[1.0, -0.5], [0.2, 2.0]], dtype=torch.float64)


def integrate(velocity, z, *, solver, n_steps):
    return make_solver(solver, n_steps, lambda: (velocity, z))(velocity, z)


def rotating(t: float, z: torch.Tensor) -> torch.Tensor:
    """Time-dependent and coupled; the solution is known, see `rotated`."""
    x, y = z.unbind(1)
    return torch.stack([-y, x], dim=1) * (1.0 + 2.0 * t) + 0.5 * z


def rotated(z: torch.Tensor) -> torch.Tensor:
    """`rotating` carried from 0 to 1: turned by the integral of 1 + 2t, grown by exp(1/2)."""
    cos, sin = math.cos(2.0), math.sin(2.0)
    turn = torch.tensor([[cos, sin], [-sin, cos]], dtype=z.dtype)
    return math.exp(0.5) * z @ turn


@pytest.mark.parametrize("name", TABLEAUS)
def test_tableaus_meet_the_order_conditions(name):
    tableau = TABLEAUS[name]
    assert sum(tableau.b) == pytest.approx(1.0)
    for c, row in zip(tableau.c, tableau.a, strict=True):
        assert sum(row) == pytest.approx(c)
    for power in range(1, tableau.order):
        moment = sum(b * c**power for b, c in zip(tableau.b, tableau.c, strict=True))
        assert moment == pytest.approx(1.0 / (power + 1))


@pytest.mark.parametrize("name", TABLEAUS)
def test_error_falls_with_the_order_of_the_method(name):
    steps = np.array([8, 16, 32, 64, 128])
    error = [
        float((integrate(rotating, Z, solver=name, n_steps=n) - rotated(Z)).abs().max())
        for n in steps
    ]
    slope = np.polyfit(np.log(1.0 / steps), np.log(error), 1)[0]
    assert slope == pytest.approx(TABLEAUS[name].order, abs=0.15)


def test_the_regression_tells_a_wrong_tableau(monkeypatch):
    wrong = Tableau(2, c=(0.0, 0.5), a=((), (0.5,)), b=(0.5, 0.5))
    monkeypatch.setitem(TABLEAUS, "midpoint", wrong)
    coarse, fine = (
        float((integrate(rotating, Z, solver="midpoint", n_steps=n) - rotated(Z)).abs().max())
        for n in (16, 128)
    )
    assert math.log(coarse / fine) / math.log(8) < 1.5


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("midpoint", [0.0, 0.25, 0.5, 0.75]),
        ("heun", [0.0, 0.5, 0.5, 1.0]),
        ("rk4", [0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0]),
    ],
)
def test_stages_are_evaluated_once_each_in_the_unit_interval(name, times):
    seen = []

    def velocity(t, z):
        seen.append(t)
        return torch.ones_like(z)

    start = Z.clone()
    end = integrate(velocity, start, solver=name, n_steps=2)
    assert seen == pytest.approx(times)
    torch.testing.assert_close(end, Z + 1.0)
    assert torch.equal(start, Z)


# ------------------------------------------------------------------- fitted multistep


def two_clusters(t: float, z: torch.Tensor) -> torch.Tensor:
    """Exact velocity from N(0, I) to an even mixture of N(+-m, s^2 I): curved, and splitting."""
    centre, s = torch.tensor([1.5, 0.5], dtype=z.dtype), 0.4
    variance = (1.0 - t) ** 2 + (t * s) ** 2
    side = torch.tanh((z @ centre) * t / variance)[:, None] * centre  # posterior mean of +-m
    return side + ((t * s**2 - (1.0 - t)) / variance) * (z - t * side)


def noise(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((n, 2), generator=generator, dtype=torch.float64)


def test_fitted_is_exact_where_the_field_only_stretches():
    def stretching(t, z):
        return (1.0 + math.sin(5.0 * t)) * z

    method = fit_multistep(stretching, noise(50, seed=0), n_steps=2)
    fresh = noise(20, seed=1)
    fine = integrate(stretching, fresh, solver="rk4", n_steps=6)  # as fine as the reference
    torch.testing.assert_close(method.integrate(stretching, fresh), fine)


def test_fitted_calls_the_network_once_a_step_and_leaves_the_noise_alone():
    start = noise(64, seed=0)
    method = fit_multistep(two_clusters, start, n_steps=4)
    seen = []

    def counted(t, z):
        seen.append(t)
        return two_clusters(t, z)

    given = start.clone()
    method.integrate(counted, given)
    assert seen == pytest.approx([0.0, 0.25, 0.5, 0.75])
    assert torch.equal(given, start)
    assert method == fit_multistep(two_clusters, start, n_steps=4)


def test_fitted_is_nearer_than_runge_kutta_for_as_many_calls_and_keeps_the_variance():
    fresh = noise(4000, seed=1)
    exact = integrate(two_clusters, fresh, solver="rk4", n_steps=200)
    method = fit_multistep(two_clusters, noise(256, seed=0), n_steps=8)
    ends = {
        "fitted": method.integrate(two_clusters, fresh),
        "midpoint": integrate(two_clusters, fresh, solver="midpoint", n_steps=4),
        "heun": integrate(two_clusters, fresh, solver="heun", n_steps=4),
        "rk4": integrate(two_clusters, fresh, solver="rk4", n_steps=2),
    }
    error = {name: float((end - exact).square().mean().sqrt()) for name, end in ends.items()}
    assert error.pop("fitted") < 0.6 * min(error.values())
    spread = {name: abs(float(end.var() / exact.var()) - 1.0) for name, end in ends.items()}
    assert spread["fitted"] < 0.02


def test_more_steps_of_fitted_bring_it_nearer():
    fresh = noise(1000, seed=1)
    exact = integrate(two_clusters, fresh, solver="rk4", n_steps=200)
    errors = [
        float(
            (
                fit_multistep(two_clusters, noise(256, seed=0), n).integrate(two_clusters, fresh)
                - exact
            )
            .square()
            .mean()
            .sqrt()
        )
        for n in (1, 2, 4, 8)
    ]
    assert all(fine < 0.8 * coarse for coarse, fine in itertools.pairwise(errors))


# ------------------------------------------------------------------------------ dopri5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dopri5_agrees_with_a_fine_rk4_and_prints_nothing(dtype, capfd):
    pytest.importorskip("torchdyn")
    z = Z.to(dtype)
    adaptive = integrate(rotating, z, solver="dopri5", n_steps=1)
    fine = integrate(rotating, z, solver="rk4", n_steps=200)
    assert adaptive.dtype == dtype
    torch.testing.assert_close(adaptive, fine, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(adaptive, rotated(z), atol=1e-4, rtol=1e-4)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_cells_and_inference_mode(solver):
    if solver == "dopri5":
        pytest.importorskip("torchdyn")
        cells = Z  # an adaptive step has no error to control without cells
    else:
        cells = Z[:0]
    with torch.inference_mode():
        assert integrate(rotating, cells, solver=solver, n_steps=3).shape == cells.shape


def test_unknown_solver():
    with pytest.raises(
        ValueError, match=r"one of fitted, midpoint, heun, rk4, dopri5; got 'euler'"
    ):
        integrate(rotating, Z, solver="euler", n_steps=2)


def test_missing_torchdyn_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdyn.numerics", None)
    monkeypatch.setitem(sys.modules, "torchdyn", None)
    message = r"expected torchdyn .*--no-deps torchdyn==.*solver='fitted'"
    with pytest.raises(ImportError, match=message):
        check_solver("dopri5")
    with pytest.raises(ImportError, match=message):
        integrate(rotating, Z, solver="dopri5", n_steps=2)
    check_solver("midpoint")
    integrate(rotating, Z, solver="midpoint", n_steps=2)  # needs none of it
