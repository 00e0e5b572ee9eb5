"""What a fitted model does: generate cells, and encode them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from torch import Tensor
from tqdm.auto import tqdm

from cfgen_augment.attributes import check_attribute
from cfgen_augment.counts import CellMatrix, as_dtype
from cfgen_augment.likelihoods import value_kind
from cfgen_augment.modalities import by_name, check_like, each, stack
from cfgen_augment.notices import notify
from cfgen_augment.parameters import RandomState, check_parameters, entropy
from cfgen_augment.processes import Processes
from cfgen_augment.saved import SavedModel
from cfgen_augment.solver import (
    REHEARSAL_CELLS,
    Solver,
    Velocity,
    check_finite,
    make_solver,
)
from cfgen_augment.stages import block_rows, encode_cells
from cfgen_augment.training import seeded

LABEL = "label"  # name of the attribute that holds the cells' labels

# A matrix, or one per modality by name.
Cells: TypeAlias = sparse.csr_matrix | NDArray | dict[str, sparse.csr_matrix | NDArray]

Terms = list[tuple[float, NDArray[np.bool_]]]


@dataclass(frozen=True)
class Wanted:
    """Cells to generate: what is known of each before it is.

    Attributes
    ----------
    codes
        Category codes, ``(n, n_attributes)``, -1 where an attribute is not given.
    totals
        Total counts, ``(n, n_sizes)``: one for every modality that has a size factor.
    pooled
        Which take how they lie around their label's centre from all labels, ``(n,)``.
    """

    codes: NDArray[np.int64]
    totals: NDArray[np.float64]
    pooled: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: slice | NDArray[np.intp]) -> Wanted:
        return Wanted(self.codes[rows], self.totals[rows], self.pooled[rows])


class FittedModel(SavedModel):
    """Generating and encoding; `CFGen` adds its parameters and how to fit them."""

    likelihood: str | Mapping[str, str]
    dispersion: str
    size_factor: str
    condition_on_size_factor: bool
    n_latent: int
    solver: str
    n_steps: int
    pooling: float
    temperature: float
    guidance: float | Mapping[str, float]
    verbose: bool

    @property
    def classes_(self) -> NDArray:
        """Labels seen in training, sorted."""
        return self.attributes_.categories[LABEL]

    def generate(
        self,
        labels: ArrayLike | None = None,
        *,
        n_cells: int | None = None,
        covariates: Mapping[str, ArrayLike] | None = None,
        guidance: float | Mapping[str, float] | None = None,
        size_factors: ArrayLike | Mapping[str, ArrayLike] | None = None,
        latents: ArrayLike | None = None,
        random_state: RandomState = None,
    ) -> Cells:
        """Generate one cell for every label, or for every row of the covariates.

        Parameters
        ----------
        labels
            Label of every cell to generate; None leaves the label out.
        n_cells
            Number of cells, needed only where neither labels nor covariates tell it.
        covariates
            Further attributes to condition on, by name, each one value per cell. Any subset of
            those seen in training.
        guidance
            One weight for the attributes given, together, or weights by name, composed by Eq. 10;
            see the class. None uses the model's own `guidance`. A weight of 0 leaves attributes out
            of the flow.
        size_factors
            Total count of every cell, of presence the number of features present; drawn from the
            fitted log-normal if None. Of several modalities, a mapping that has those with a size
            factor.
        latents
            Latents to decode instead of the flow's, ``(n_cells, n_latent)``, for example from
            `encode`. Guidance then does nothing; all else is drawn as it would have been.
        random_state
            Seed; None uses the model's own `random_state`. The same whole number gives the same
            cells in every call, so pass another one for other cells.

        Returns
        -------
        CSR matrix of shape (n_cells, n_features)
            Counts, in the dtype of the training data. With the Gaussian likelihood, an ndarray.
            Of several modalities, a dict that has a matrix for each.

        Raises
        ------
        RuntimeError
            If the model is not fitted.
        ValueError
            If a label, covariate or weight is unknown, or lengths or shapes disagree.

        Warns
        -----
        UserWarning
            If drawn counts exceed what the training data's dtype can hold; they are held at its
            largest value.
        """
        blocks = self.generate_blocks(
            labels,
            n_cells=n_cells,
            covariates=covariates,
            guidance=guidance,
            size_factors=size_factors,
            latents=latents,
            random_state=random_state,
        )
        return stack(list(blocks))

    def generate_blocks(
        self,
        labels: ArrayLike | None = None,
        *,
        n_cells: int | None = None,
        covariates: Mapping[str, ArrayLike] | None = None,
        guidance: float | Mapping[str, float] | None = None,
        size_factors: ArrayLike | Mapping[str, ArrayLike] | None = None,
        latents: ArrayLike | None = None,
        random_state: RandomState = None,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[Cells]:
        """Generate the same cells as `generate`, a block of rows at a time.

        Memory does not grow with the number of cells but for a few numbers per cell (its
        attributes and its total). Everything is checked here, before the first block is asked
        for.

        Every block has a seed of its own, so that several processes can each generate a share of
        the blocks, and together what one would.

        Parameters
        ----------
        labels, n_cells, covariates, guidance, size_factors, latents, random_state
            As in `generate`.
        share
            Which of how many nearly equal shares of the blocks to generate, from ``(0, n)`` to
            ``(n - 1, n)``. All else is that of all cells.

        Returns
        -------
        iterator of CSR matrices (or ndarrays) of shape (n_block, n_features)
            At least one block, empty if no cells are wanted. One below the other, and the shares
            likewise, they are what `generate` returns; dicts of matrices for several modalities.

        Raises
        ------
        RuntimeError, ValueError
            As `generate`; also if there is no such share.

        Warns
        -----
        UserWarning
            As `generate`, after the last block.

        Examples
        --------
        >>> import numpy as np
        >>> from cfgen_augment import CFGen
        >>> rng = np.random.default_rng(0)
        >>> X = rng.poisson(3.0, size=(60, 8))
        >>> model = CFGen(max_epochs=1, random_state=0, device="cpu").fit(X, ["B", "T"] * 30)
        >>> [block.shape for block in model.generate_blocks(["B"] * 2_000)]
        [(1024, 8), (976, 8)]
        """
        self._check_fitted()
        check_parameters(self.__dict__)
        which, n_shares = share
        if not 0 <= which < n_shares:
            raise ValueError(
                f"share: expected (which, of how many), counted from zero; got {share}. Pass "
                "(0, n) to (n - 1, n)."
            )
        wanted, n = self._check_wanted(labels, covariates, n_cells)
        codes = self.attributes_.encode(wanted, n)
        terms = self.attributes_.terms(
            self.guidance if guidance is None else guidance, wanted.keys()
        )
        if latents is not None:
            latents = np.asarray(latents, dtype=np.float32)
            if latents.shape != (n, self.n_latent) or not np.isfinite(latents).all():
                raise ValueError(
                    f"latents: expected finite values of shape {(n, self.n_latent)}; got shape "
                    f"{latents.shape} with {(~np.isfinite(latents)).sum()} that are not finite. "
                    "Pass one row per cell to generate, as encode returns them."
                )
        if self.dispersion == "gene-label" and LABEL not in wanted:
            raise ValueError(
                "dispersion='gene-label': expected labels for the cells to generate; got none. "
                "Pass labels (with guidance={'label': 0} to keep them out of the flow)."
            )
        seed = self.random_state if random_state is None else random_state
        random = np.random.default_rng(entropy(seed))
        totals = self._totals(size_factors, codes, random)
        cells = Wanted(codes, totals, self._pooled(codes[:, 0], random))
        rows = block_rows(self.n_features_in_)
        seeds = random.integers(2**63, size=math.ceil(n / rows))
        solver = None
        if latents is None and n:
            solver = self._solver(cells, terms, random)
        own = Processes(which, n_shares).share(len(seeds))
        blocks = [
            (slice(i * rows, min((i + 1) * rows, n)), int(seeds[i]))
            for i in range(own.start, own.stop)
        ]
        return self._drawn(cells, terms, solver, latents, blocks, show=which == 0)

    def _pooled(self, labels: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.bool_]:
        """Which cells take how they lie around their label's centre from all labels."""
        cells = self.label_counts_[labels]
        return random.random(len(labels)) * (cells + self.pooling) < self.pooling

    def _drawn(
        self,
        cells: Wanted,
        terms: Terms,
        solver: Solver | None,
        latents: NDArray[np.float32] | None,
        blocks: Sequence[tuple[slice, int]],
        *,
        show: bool,
    ) -> Iterator[Cells]:
        """Cells of blocks (rows and seed), in the training data's dtype; at least one block."""
        if not blocks:
            yield self._empty()
        dtypes = each(self.modalities_, self.dtype_, "dtype_")
        too_large = [0] * len(dtypes)
        hidden = not (self.verbose and show)
        for block, seed in tqdm(blocks, desc="generate", unit="block", disable=hidden):
            generator = torch.Generator(self.device_).manual_seed(seed)
            given = None if latents is None else latents[block]
            drawn = self._generate_block(cells[block], terms, solver, given, generator)
            cast = []
            for i, (matrix, dtype) in enumerate(zip(drawn, dtypes, strict=True)):
                if sparse.issparse(matrix):
                    matrix, held = as_dtype(matrix, dtype)
                    too_large[i] += held
                else:
                    matrix = matrix.astype(np.result_type(dtype, np.float32), copy=False)
                cast.append(matrix)
            yield by_name(self.modalities_, cast)
        for modality, dtype, n in zip(self.modalities_, dtypes, too_large, strict=True):
            if n:
                of = "" if modality.name is None else f" of {modality.name!r}"
                notify(
                    f"{n:,} generated counts{of} were larger than {dtype} can hold exactly and "
                    "were held at its largest value; fit on a wider dtype to keep them.",
                )

    def _empty(self) -> Cells:
        parts: list[Any] = []
        for modality, dtype in zip(
            self.modalities_, each(self.modalities_, self.dtype_, "dtype_"), strict=True
        ):
            shape = (0, modality.n_features)
            if value_kind(modality.likelihood) == "real":
                parts.append(np.empty(shape, dtype=np.float32))
            else:
                parts.append(as_dtype(sparse.csr_matrix(shape, dtype=np.int32), dtype)[0])
        return by_name(self.modalities_, parts)

    def encode(self, X: CellMatrix | Mapping[str, CellMatrix]) -> NDArray[np.float32]:
        """Latents of cells, ``(n_cells, n_latent)``, block by block; see `generate`.

        Parameters
        ----------
        X
            What `fit` takes, on the same features, ``(n_cells, n_features)``, or a mapping of
            such matrices where the model was fitted on one.

        Raises
        ------
        RuntimeError
            If the model is not fitted.
        ValueError, TypeError
            If the matrix is not what the model was fitted on.
        """
        self._check_fitted()
        matrices = check_like(self.modalities_, X)
        latents: NDArray[np.float32] = (
            encode_cells(self.network_.autoencoder, matrices, self.device_).cpu().numpy()
        )
        return latents

    @torch.inference_mode()
    def _solver(self, cells: Wanted, terms: Terms, random: np.random.Generator) -> Solver:
        """How to integrate the flow; what is fitted to the field rehearses on cells like these."""

        def rehearse() -> tuple[Velocity, Tensor]:
            some = random.integers(len(cells), size=REHEARSAL_CELLS)
            return self._start(cells[some], terms, seeded(random, self.device_))

        return make_solver(self.solver, self.n_steps, rehearse)

    def _start(
        self, cells: Wanted, terms: Terms, generator: torch.Generator
    ) -> tuple[Velocity, Tensor]:
        """The guided field of some cells, and the noise ``(n, n_latent)`` they start from."""
        attributes = torch.as_tensor(cells.codes + 1, device=self.device_)
        noise = torch.empty((len(cells), self.n_latent), device=self.device_)
        noise.normal_(generator=generator)
        scale = self.temperature * self.network_.noise_scale(attributes, terms)
        return self._velocity(cells, terms), noise * scale

    def _velocity(self, cells: Wanted, terms: Terms) -> Velocity:
        """The guided field of some cells."""
        device = self.device_
        return self.network_.velocity(
            torch.as_tensor(cells.codes + 1, device=device),
            terms,
            self._flow_size(cells.totals, device),
            torch.as_tensor(cells.pooled, device=device),
        )

    @torch.inference_mode()
    def _generate_block(
        self,
        cells: Wanted,
        terms: Terms,
        solver: Solver | None,
        given: NDArray[np.float32] | None,
        generator: torch.Generator,
    ) -> list[sparse.csr_matrix | NDArray]:
        """Cells of the given latents, or of latents that the solver carries noise to."""
        device = self.device_
        if solver is None:
            latents = torch.as_tensor(given, device=device)
        else:
            velocity, noise = self._start(cells, terms, generator)
            latents = check_finite(self.network_.latents(noise, velocity, solver))
        log_size = torch.as_tensor(np.log(cells.totals), dtype=torch.float32, device=device)
        labels = torch.as_tensor(cells.codes[:, 0], device=device)
        return self.network_.draw(latents, log_size, labels, generator)

    def _check_wanted(
        self,
        labels: ArrayLike | None,
        covariates: Mapping[str, ArrayLike] | None,
        n_cells: int | None,
    ) -> tuple[dict[str, NDArray], int]:
        """Attributes that were given, by name, and the number of cells."""
        wanted: dict[str, NDArray] = {}
        if labels is not None:
            wanted[LABEL] = check_attribute(labels, "labels")
        for name, values in ({} if covariates is None else covariates).items():
            known = self.attributes_.names[1:]
            if name not in known:
                raise ValueError(
                    f"covariates: expected names the model was fitted with ({known}); got "
                    f"{name!r}. Leave it out (in AnnData's door, {name}_key or --{name}-key), or "
                    "train with it."
                )
            wanted[name] = check_attribute(values, name)
        lengths = {name: len(values) for name, values in wanted.items()}
        if n_cells is not None:
            if not isinstance(n_cells, Integral) or n_cells < 0:
                raise ValueError(f"n_cells: expected a whole number from 0; got {n_cells!r}.")
            lengths["n_cells"] = int(n_cells)
        if not lengths:
            raise ValueError(
                "generate: expected labels, covariates or n_cells; got none of them. Pass n_cells "
                "to generate without attributes."
            )
        if len(set(lengths.values())) > 1:
            raise ValueError(f"generate: expected equal lengths; got {lengths}.")
        return wanted, next(iter(lengths.values()))

    def _totals(
        self,
        size_factors: ArrayLike | Mapping[str, ArrayLike] | None,
        codes: NDArray[np.int64],
        random: np.random.Generator,
    ) -> NDArray[np.float64]:
        """Total counts of the wanted cells, ``(n, n_sizes)``."""
        n = len(codes)
        scaled = [modality for modality in self.modalities_ if modality.has_size_factor]
        if size_factors is not None:
            given = each(scaled or self.modalities_[:1], size_factors, "size_factors")
            return np.column_stack([_check_totals(totals, n) for totals in given])
        if not scaled:
            return np.ones((n, 1))
        groups, _ = self._size_factor_groups(codes)
        return self.size_factor_.sample(groups, random)

    def _size_factor_groups(self, codes: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Group of every cell in the size-factor fit (-1: not given), and number of groups."""
        if self.size_factor == "shared":
            return np.zeros(len(codes), dtype=np.int64), 1
        column = self.attributes_.names.index(self.size_factor)
        return codes[:, column], self.attributes_.sizes[column]

    def _flow_size(self, totals: NDArray[np.float64], device: torch.device) -> Tensor | None:
        """Size factors as the flow sees them, ``(n, n_sizes)``, or None if it does not."""
        if not self.condition_on_size_factor:
            return None
        scaled = self.size_factor_.scaled(totals)
        return torch.as_tensor(scaled, dtype=torch.float32, device=device)


def _check_totals(size_factors: ArrayLike, n: int) -> NDArray[np.float64]:
    totals = np.asarray(size_factors, dtype=np.float64)
    if totals.shape != (n,) or not (np.isfinite(totals).all() and (totals > 0).all()):
        raise ValueError(
            f"size_factors: expected {n:,} positive totals; got shape {totals.shape} with "
            f"smallest value {totals.min(initial=np.inf):g}."
        )
    return totals
