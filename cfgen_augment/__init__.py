"""Augment rare cell types with CFGen: raw counts in, raw counts out.

`CFGenSampler` is an imbalanced-learn sampler, `augment` works on AnnData, `augment_file` from file
to file, and `CFGen` is the generative model behind them, on arrays. `diagnose` compares generated
with real cells, `plot` draws them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cfgen_augment import plot
    from cfgen_augment.augmentation import augment, augment_file
    from cfgen_augment.diagnosis import diagnose
    from cfgen_augment.model import CFGen
    from cfgen_augment.sampler import CFGenSampler

__version__ = "0.1.0"
__all__ = ["CFGen", "CFGenSampler", "augment", "augment_file", "diagnose", "plot"]

_HOME = {
    "CFGen": "model",
    "CFGenSampler": "sampler",
    "augment": "augmentation",
    "augment_file": "augmentation",
    "diagnose": "diagnosis",
}


def __getattr__(name: str) -> Any:
    # Torch and scikit-learn are imported when a name is first used, not with the package.
    if name == "plot":
        return import_module(f"{__name__}.plot")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
