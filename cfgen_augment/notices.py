"""Warnings that point at the user's line."""

from __future__ import annotations

import inspect
import warnings

# Whose lines are not the user's: ours, and those through which they reach ours.
_BETWEEN = {"cfgen_augment", "imblearn", "sklearn", "contextlib"}


def notify(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, as from the line of the user's that led here.

    How deep that is nothing here can count: the same code is reached through methods, functions,
    pipelines and the command.
    """
    depth = 1
    frame = inspect.currentframe()
    while frame is not None and str(frame.f_globals.get("__name__")).split(".")[0] in _BETWEEN:
        frame = frame.f_back
        depth += 1
    warnings.warn(message, category, stacklevel=depth)
