"""What a run is asked to do, and which settings its results depend on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cfgen_augment.allocation import total_after


@dataclass(frozen=True)
class Settings:
    """Everything that results depend on, besides arms and seeds, which may grow between runs.

    Attributes
    ----------
    data, label_key, donor_key, layer
        As for `benchmarks.data.load_cells`.
    n_splits, held_out
        Number of splits, and share of donors held out in each.
    thin
        Types made rare in training and the cells they keep.
    reserve
        Share of every other type's training cells that is set aside for tests of memorisation.
    n_genes
        Highly variable genes chosen on training cells.
    target_size
        Size after augmentation: total cells, or a multiple of the training cells.
    embedders
        ``pca``, ``scgpt``, ``obsm:KEY``.
    scgpt_dir
        Checkpoint for ``scgpt``.
    rare_share
        A type is rare with less than this share of the training cells.
    celltypist
        Whether CellTypist's own model is fitted too.
    seed
        Source of splits, and of every arm's seeds.
    inner
        Whether every split is one within its training donors, see `splits.inner_splits`.
    """

    data: str
    label_key: str | None = None
    donor_key: str | None = None
    layer: str | None = None
    n_splits: int = 5
    held_out: float = 0.2
    thin: tuple[tuple[str, int], ...] = ()
    reserve: float = 0.1
    n_genes: int = 2000
    target_size: int | float = 2.0
    embedders: tuple[str, ...] = ("pca",)
    scgpt_dir: str | None = None
    rare_share: float = 0.05
    celltypist: bool = False
    seed: int = 0
    inner: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("held_out", 0, 1),
            ("reserve", 0, 1),
            ("rare_share", 0, 1),
            ("n_splits", 0, None),
            ("n_genes", 1, None),
        ):
            value = getattr(self, name)
            below = value < low or (value == low and name not in ("reserve", "rare_share"))
            if below or (high is not None and value >= high):
                bounds = f"above {low}" + ("" if high is None else f" and below {high}")
                raise ValueError(
                    f"--{name.replace('_', '-')}: expected a number {bounds}; got {value}."
                )
        total_after(1000, self.target_size if self.target_size < 1000 else 1000)
        if "scgpt" in self.embedders and self.scgpt_dir is None:
            raise ValueError(
                "--embedder scgpt: expected a checkpoint; pass --scgpt-dir, and make one with "
                "'python -m benchmarks pretrain-scgpt' if there is none."
            )
        if len(set(self.embedders)) < len(self.embedders):
            raise ValueError(f"--embedder: got one twice: {' '.join(self.embedders)}.")

    def document(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self) | {"thin": dict(self.thin), "embedders": list(self.embedders)}

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Settings:
        """Back from the manifest."""
        return cls(
            **document
            | {
                "thin": tuple(document["thin"].items()),
                "embedders": tuple(document["embedders"]),
            }
        )


@dataclass(frozen=True)
class Place:
    """Where and how a run works; changes nothing of its results.

    Attributes
    ----------
    out
        Directory of the results.
    jobs, threads
        Processes, and threads in each.
    """

    out: Path
    jobs: int
    threads: int
