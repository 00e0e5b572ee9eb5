"""Real cells carried to other covariates: back to noise as they are, forward as they might be."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cfgen_augment.counts import CellMatrix
from cfgen_augment.generation import LABEL, Cells, FittedModel, Terms, Wanted
from cfgen_augment.modalities import by_name, check_like, totals_of
from cfgen_augment.parameters import RandomState, entropy
from cfgen_augment.solver import Velocity, make_solver

_CELLS = 4096  # carried at a time
_STEPS = 20  # of rk4, each way: a cell carried to what it is comes back to 1e-5 of the spread


class TranslatingModel(FittedModel):
    """Translating cells between covariates; `CFGen` adds its parameters and how to fit them."""

    def translate(
        self,
        X: CellMatrix | Mapping[str, CellMatrix],
        labels: ArrayLike | None = None,
        *,
        covariates: Mapping[str, ArrayLike],
        to: Mapping[str, ArrayLike],
        guidance: float | Mapping[str, float] | None = None,
        size_factors: ArrayLike | Mapping[str, ArrayLike] | None = None,
        random_state: RandomState = None,
    ) -> Cells:
        r"""Draw real cells as they might be with other covariates, such as another donor.

        A cell's latent is carried along the flow back to noise, given what the cell is, and from
        the same noise forward again, given what it is to be:

        .. math:: z_0 = z_1 - \int_0^1 v(z_t, t \mid y, d, l) \, dt, \qquad
            z_1' = z_0 + \int_0^1 v(z_t', t \mid y, d', l') \, dt

        The noise holds what attributes do not tell, so a cell keeps its place among its like.
        Counts are then drawn from what :math:`z_1'` decodes to.

        Parameters
        ----------
        X
            What `fit` takes, on the same features, ``(n_cells, n_features)``, or a mapping of
            such matrices where the model was fitted on one.
        labels
            Label of every cell, which it keeps. None leaves the label out; the flow then has to
            tell from the latent what it needs, and types may shift.
        covariates
            What cells are: covariates by name, each one value per cell. All those in `to`, and
            any others of the model, which stay as they are.
        to
            What they are to be: covariates by name, each one value for all cells or one per cell.
        guidance
            As in `generate`, both ways, so that cells carried to what they are stay.
        size_factors
            Total counts of the translated cells, as in `generate`; None keeps each cell's own.
        random_state
            Seed; None uses the model's own `random_state`.

        Returns
        -------
        CSR matrix of shape (n_cells, n_features)
            Counts, in the dtype of the training data. With the Gaussian likelihood, an ndarray.
            Of several modalities, a dict that has a matrix for each.

        Raises
        ------
        RuntimeError
            If the model is not fitted.
        ValueError, TypeError
            If the matrix is not what the model was fitted on, an attribute or a value of it is
            unknown or missing, or lengths disagree.

        See Also
        --------
        generate : Cells from noise of their own.

        Examples
        --------
        >>> import numpy as np
        >>> from cfgen_augment import CFGen
        >>> rng = np.random.default_rng(0)
        >>> X = rng.poisson(3.0, size=(60, 8))
        >>> labels, donors = ["B", "T"] * 30, np.repeat(["d1", "d2"], 30)
        >>> model = CFGen(max_epochs=2, random_state=0, device="cpu")
        >>> model = model.fit(X, labels, covariates={"donor": donors})
        >>> moved = model.translate(X, labels, covariates={"donor": donors}, to={"donor": "d2"})
        >>> moved.shape
        (60, 8)
        """
        self._check_fitted()
        matrices = check_like(self.modalities_, X)
        n = matrices[0].shape[0]
        before, _ = self._check_wanted(labels, covariates, n)
        target = self._check_target(to, before, n)
        codes = [self.attributes_.encode(given, n) for given in (before, before | target)]
        guidance = self.guidance if guidance is None else guidance
        terms = self.attributes_.terms(guidance, before.keys())
        seed = entropy(self.random_state if random_state is None else random_state)
        random = np.random.default_rng(seed)
        pooled = self._pooled(codes[0][:, 0], random)
        own = totals_of(self.modalities_, matrices)
        if size_factors is None:
            totals = [own, own]
        else:
            totals = [own, self._totals(size_factors, codes[1], random)]
        scaled = [modality for modality in self.modalities_ if modality.has_size_factor]
        was, will_be = (Wanted(*known, pooled) for known in zip(codes, totals, strict=True))
        latents = self._carried(self.encode(X), was, will_be, terms)
        return self.generate(
            before.get(LABEL),
            n_cells=n,
            covariates={name: v for name, v in (before | target).items() if name != LABEL},
            size_factors=by_name(scaled, list(totals[1].T)) if scaled else None,
            latents=latents,
            random_state=seed,
        )

    def _check_target(
        self, to: Mapping[str, ArrayLike], before: Mapping[str, NDArray], n_cells: int
    ) -> dict[str, NDArray]:
        """What cells are to be, one value each."""
        to = dict(to)  # a Series, too
        if not to or not set(to) <= set(before) - {LABEL}:
            given = sorted(set(before) - {LABEL})
            raise ValueError(
                f"to: expected one or more of the covariates that tell what cells are ({given}); "
                f"got {sorted(to)}. Pass the cells' own values in covariates too."
            )
        full = {
            name: np.repeat(values, n_cells) if np.ndim(values) == 0 else values
            for name, values in to.items()
        }
        target, _ = self._check_wanted(None, full, n_cells)
        return target

    @torch.inference_mode()
    def _carried(
        self, latents: NDArray[np.float32], was: Wanted, will_be: Wanted, terms: Terms
    ) -> NDArray[np.float32]:
        """Latents of the same noise under other conditions, ``(n_cells, n_latent)``."""
        network = self.network_
        carried = np.empty_like(latents)
        for start in range(0, len(latents), _CELLS):
            rows = slice(start, start + _CELLS)
            back, forward = (self._velocity(cells[rows], terms) for cells in (was, will_be))
            z = torch.as_tensor(latents[rows], device=self.device_)
            z = (z - network.latent_mean) / network.latent_scale
            solver = make_solver("rk4", _STEPS, partial(_rehearsal, forward, z))
            noise = solver(partial(_backwards, back), z)
            carried[rows] = network.latents(noise, forward, solver).cpu().numpy()
        return carried


def _rehearsal(velocity: Velocity, z: Tensor) -> tuple[Velocity, Tensor]:
    return velocity, z


def _backwards(velocity: Velocity, t: float, z: Tensor) -> Tensor:
    """The field that leads from data, now at time zero, to noise."""
    return -velocity(1.0 - t, z)
