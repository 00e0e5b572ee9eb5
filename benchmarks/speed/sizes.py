"""Cost per cell and peak memory of generation as the number of cells grows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

_TRAINED_ON = 5_000


def flatness(sizes: list[int], n_genes: int, folder: Path) -> pd.DataFrame:
    """Generate each number of cells block by block into an h5ad file."""
    raise NotImplementedError
