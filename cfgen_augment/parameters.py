"""What users pass as parameters and seeds, checked and brought into one form."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np

from cfgen_augment.likelihoods import LIKELIHOODS
from cfgen_augment.solver import SOLVERS

RandomState = int | np.random.Generator | np.random.RandomState | None


def pair(value: Any) -> tuple[Any, Any]:
    """(autoencoder, flow) from one value for both or a pair."""
    if isinstance(value, (tuple, list)):
        first, second = value
        return first, second
    return value, value


def entropy(random_state: RandomState) -> int:
    """Seed material from whatever users call a random state; None asks the system for some.

    Raises
    ------
    ValueError
        If it is none of those.
    """
    if random_state is None:
        return int(np.random.SeedSequence().generate_state(1)[0])
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**32))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31 - 1))
    if isinstance(random_state, Integral) and int(random_state) >= 0:
        return int(random_state)
    raise ValueError(
        "random_state: expected None, a non-negative whole number, or a NumPy generator; got "
        f"{random_state!r}."
    )


def _whole(least: int) -> Any:
    def check(value: Any) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least

    return check


def _real(low: float, high: float = np.inf) -> Any:
    def check(value: Any) -> bool:
        return isinstance(value, Real) and low <= float(value) < high

    return check


def _pair_of(check: Any) -> Any:
    def check_pair(value: Any) -> bool:
        return (not isinstance(value, (tuple, list)) or len(value) == 2) and all(
            check(part) for part in pair(value)
        )

    return check_pair


def _for_each(check: Any) -> Any:
    def check_each(value: Any) -> bool:
        values = value.values() if isinstance(value, Mapping) else [value]
        return all(check(part) for part in values)

    return check_each


def _widths(value: Any) -> bool:
    if isinstance(value, str):
        return value == "auto"
    return isinstance(value, (tuple, list)) and len(value) > 0 and all(map(_whole(1), value))


_TINY = np.finfo(float).tiny
_COUNT = (_whole(1), "a whole number of at least 1")
_RULES: dict[str, tuple[Any, str]] = {
    "likelihood": (
        _for_each(lambda v: isinstance(v, str) and v in ("auto", *LIKELIHOODS)),
        f"'auto' or one of {LIKELIHOODS}, or a mapping from modalities to them",
    ),
    "dispersion": (lambda v: v in ("gene", "gene-label"), "'gene' or 'gene-label'"),
    "size_factor": (lambda v: isinstance(v, str), "'shared', 'label' or the name of a covariate"),
    "n_latent": _COUNT,
    "hidden": (
        _for_each(_widths),
        "'auto', at least one width, each a whole number of at least 1, or a mapping from "
        "modalities to them",
    ),
    "flow_width": (_whole(2), "a whole number of at least 2"),
    "flow_blocks": _COUNT,
    "max_epochs": (
        lambda v: (isinstance(v, str) and v == "auto") or _pair_of(_whole(1))(v),
        "'auto', a whole number of at least 1, or a pair of them",
    ),
    "batch_size": (_whole(2), "a whole number of at least 2"),
    "learning_rate": (_pair_of(_real(_TINY)), "a positive number, or a pair of them"),
    "count_splitting": (lambda v: isinstance(v, (bool, np.bool_)), "True or False"),
    "label_weight": (_real(0.0), "a number of at least 0"),
    "pooling": (_real(0.0), "a number of at least 0"),
    "temperature": (_real(0.0), "a number of at least 0"),
    "attribute_dropout": (_real(0.0, 1.0), "a number in [0, 1)"),
    "validation_fraction": (_real(0.0, 1.0), "a number in [0, 1)"),
    "patience": (
        lambda v: (isinstance(v, str) and v == "auto") or _whole(1)(v),
        "'auto' or a whole number of at least 1",
    ),
    "solver": (lambda v: v in SOLVERS, f"one of {SOLVERS}"),
    "n_steps": _COUNT,
    "distributed": (lambda v: isinstance(v, (bool, np.bool_)), "True or False"),
    "guidance": (
        lambda v: all(map(_real(-np.inf), v.values() if isinstance(v, Mapping) else [v])),
        "a number, or a mapping from attributes to numbers",
    ),
}


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Check the parameters of `CFGen` by name.

    Raises
    ------
    ValueError
        Names the first that is not what is expected.
    """
    for name, (holds, expected) in _RULES.items():
        if not holds(parameters[name]):
            raise ValueError(f"{name}: expected {expected}; got {parameters[name]!r}.")
