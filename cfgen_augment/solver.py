"""Integrate a velocity field from noise (t = 0) to data (t = 1).

Runge-Kutta methods know nothing of the field; the fitted multistep method is made for it, from
a rehearsal on a few cells, and needs a fraction of their network calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Velocity = Callable[[float, Tensor], Tensor]
Solver = Callable[[Velocity, Tensor], Tensor]

ADAPTIVE_TOLERANCE = 1e-5  # atol and rtol of dopri5, the CFGen paper's setting

REHEARSAL_CELLS = 256  # each gives n_latent equations for n_steps + 1 unknowns at most
_FEWEST_REFERENCE_STEPS = 5  # of rk4; at least one per step of the method that is fitted


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

SOLVERS = ("fitted", *TABLEAUS, "dopri5")


@dataclass(frozen=True)
class Multistep:
    r"""Explicit linear multistep method on equal steps that remembers every velocity so far.

    .. math:: z_{i + 1} = a_i z_0 + \sum_{j \le i} b_{ij} \, v(t_j, z_j), \quad t_j = j / n

    One network call per step.

    Attributes
    ----------
    weights
        Per step ``i``, ``(a_i, b_i0, ..., b_ii)``.
    """

    weights: tuple[tuple[float, ...], ...]

    def integrate(self, velocity: Velocity, z: Tensor) -> Tensor:
        """Carry `z` ``(n, d)`` along `velocity` from t = 0 to t = 1."""
        seen = [z]
        state = z
        for step, weights in enumerate(self.weights):
            seen.append(velocity(step / len(self.weights), state))
            state = weights[0] * z
            for weight, vector in zip(weights[1:], seen[1:], strict=True):
                state.add_(vector, alpha=weight)
        return state


@torch.no_grad()
def fit_multistep(velocity: Velocity, z: Tensor, n_steps: int) -> Multistep:
    """The multistep method that follows this field best, by least squares.

    Reference trajectories are computed by rk4. Step by step, the weights are chosen so that the
    method's own states, started from the same noise, come closest to them. What few steps cannot
    follow then averages out over cells instead of shrinking all of them, as few steps of a
    general method do. The idea of a solver made for one field is that of bespoke solvers [1]_.

    Parameters
    ----------
    velocity
        The field, for the cells of `z`.
    z
        Noise, shape ``(n, d)``; some 10,000 numbers determine the few weights well.
    n_steps
        Steps, and network calls, of the method.

    Returns
    -------
    Multistep
        The method.

    References
    ----------
    .. [1] N. Shaul et al., "Bespoke Non-Stationary Solvers for Fast Sampling of Diffusion and
       Flow Models", arXiv:2403.01329.
    """
    refinement = -(-_FEWEST_REFERENCE_STEPS // n_steps)
    h = 1.0 / (n_steps * refinement)
    seen, reference, state = [z], z, z
    weights = []
    for step in range(n_steps):
        seen.append(velocity(step / n_steps, state))
        for part in range(step * refinement, (step + 1) * refinement):
            reference = _step(velocity, reference, part * h, h, TABLEAUS["rk4"])
        # Late velocities resemble each other: double precision keeps their differences.
        known = check_finite(torch.stack([vector.reshape(-1) for vector in seen], dim=1))
        known, wanted = known.double().cpu(), check_finite(reference).reshape(-1, 1).double().cpu()
        solution = torch.linalg.lstsq(known, wanted, driver="gelsd").solution[:, 0]
        weights.append(tuple(solution.tolist()))
        state = (known @ solution).to(z).reshape(z.shape)
    return Multistep(tuple(weights))


def check_finite(latents: Tensor) -> Tensor:
    """The same latents.

    Raises
    ------
    ValueError
        If some are not finite: the field was followed to where it knows nothing.
    """
    if not torch.isfinite(latents).all():
        raise ValueError(
            "latents: expected finite values; got infinite ones or NaN. Strong guidance or "
            "temperature leads cells away from all data: lower them."
        )
    return latents


def make_solver(name: str, n_steps: int, rehearse: Callable[[], tuple[Velocity, Tensor]]) -> Solver:
    """The solver called `name`, a function of a velocity and initial states ``(n, d)``.

    Parameters
    ----------
    name
        ``"fitted"``, see `fit_multistep`; ``"midpoint"``, ``"heun"`` or ``"rk4"`` with `n_steps`
        equal steps; or ``"dopri5"``, adaptive at tolerance 1e-5 through torchdyn.
    n_steps
        Number of steps of all but dopri5.
    rehearse
        Called by ``"fitted"`` for the field and the noise ``(n, d)`` it is fitted on.

    Raises
    ------
    ValueError
        If the solver is unknown.
    ImportError
        If ``"dopri5"`` is asked for and torchdyn is not installed.
    """
    check_solver(name)
    if name == "fitted":
        return fit_multistep(*rehearse(), n_steps).integrate
    if name == "dopri5":
        return _dopri5
    return partial(_runge_kutta, TABLEAUS[name], n_steps)


def _runge_kutta(tableau: Tableau, n_steps: int, velocity: Velocity, z: Tensor) -> Tensor:
    for step in range(n_steps):
        z = _step(velocity, z, step / n_steps, 1.0 / n_steps, tableau)
    return z


def _step(velocity: Velocity, z: Tensor, t: float, h: float, tableau: Tableau) -> Tensor:
    """One Runge-Kutta step from time `t` to ``t + h``."""
    stages: list[Tensor] = []
    for c, row in zip(tableau.c, tableau.a, strict=True):
        stages.append(velocity(t + c * h, _combine(z, row, stages, h)))
    return _combine(z, tableau.b, stages, h)


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
            "torchdyn==1.0.6 torchsde==0.2.6; or use solver='fitted'."
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
