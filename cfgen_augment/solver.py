"""Integrate a velocity field from noise (t = 0) to data (t = 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Velocity = Callable[[float, Tensor], Tensor]

ADAPTIVE_TOLERANCE = 1e-5  # atol and rtol of dopri5, the CFGen paper's setting


@dataclass(frozen=True)
class Tableau:
    """Butcher tableau of an explicit Runge-Kutta method.

    Stage ``i`` is evaluated at time ``c[i]`` from the earlier stages weighted by ``a[i]``; the
    step combines the stages by ``b``.
    """

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


TABLEAUS = {
    "midpoint": Tableau(2, c=(0.0, 0.5), a=((), (0.5,)), b=(0.0, 1.0)),
    "heun": Tableau(2, c=(0.0, 1.0), a=((), (1.0,)), b=(0.5, 0.5)),
    "rk4": Tableau(
        4,
        c=(0.0, 0.5, 0.5, 1.0),
        a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
}

SOLVERS = (*TABLEAUS, "dopri5")


def integrate(velocity: Velocity, z: Tensor, *, solver: str, n_steps: int) -> Tensor:
    """Carry `z` along `velocity` from t = 0 to t = 1.

    Parameters
    ----------
    velocity
        Function of a time in [0, 1] and a state ``(n, d)`` to a velocity ``(n, d)``.
    z
        Initial states, shape ``(n, d)``.
    solver
        ``"midpoint"``, ``"heun"`` or ``"rk4"`` with `n_steps` equal steps, or ``"dopri5"``,
        adaptive at tolerance 1e-5 through torchdyn.
    n_steps
        Number of steps of the fixed-step solvers.

    Returns
    -------
    Tensor of shape (n, d)
        States at t = 1.

    Raises
    ------
    ValueError
        If the solver is unknown.
    ImportError
        If ``"dopri5"`` is asked for and torchdyn is not installed.
    """
    check_solver(solver)
    if solver == "dopri5":
        return _dopri5(velocity, z)
    tableau = TABLEAUS[solver]
    h = 1.0 / n_steps
    for step in range(n_steps):
        stages: list[Tensor] = []
        for c, row in zip(tableau.c, tableau.a, strict=True):
            state = _combine(z, row, stages, h)
            stages.append(velocity((step + c) * h, state))
        z = _combine(z, tableau.b, stages, h)
    return z


def _combine(z: Tensor, weights: tuple[float, ...], stages: list[Tensor], h: float) -> Tensor:
    for weight, stage in zip(weights, stages, strict=True):
        if weight:
            z = torch.add(z, stage, alpha=h * weight)
    return z


def check_solver(solver: str) -> None:
    """Check that `solver` can be used, so that a long training need not end in this error.

    Raises
    ------
    ValueError
        If the solver is unknown.
    ImportError
        If ``"dopri5"`` is asked for and torchdyn is not installed.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}; got {solver!r}.")
    if solver == "dopri5":
        _odeint()


def _odeint() -> Callable[..., tuple[Tensor, Tensor]]:
    try:
        from torchdyn.numerics import odeint
    except ImportError as error:
        raise ImportError(
            "solver='dopri5': expected torchdyn to be installed; could not import it "
            f"({error}). Run: pip install 'cfgen-augment[dopri5]', then pip install --no-deps "
            "torchdyn==1.0.6 torchsde==0.2.6; or use solver='midpoint'."
        ) from error
    return odeint


def _dopri5(velocity: Velocity, z: Tensor) -> Tensor:
    _, states = _odeint()(
        lambda t, state: velocity(float(t), state),
        z,
        torch.tensor([0.0, 1.0], dtype=z.dtype, device=z.device),
        solver="dopri5",
        atol=ADAPTIVE_TOLERANCE,
        rtol=ADAPTIVE_TOLERANCE,
    )
    return states[-1]
