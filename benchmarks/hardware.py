"""What a measurement was made on."""

from __future__ import annotations

import os
import platform

import torch


def hardware() -> str:
    """Cores used, processor family, and versions, in one line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{torch.get_num_threads()} threads on {os.cpu_count()} cores ({platform.machine()}), "
        f"{device}, Python {platform.python_version()}, torch {torch.__version__}"
    )
