"""Stages of fitting and generating over the history of the repository, measured by asv.

    asv run --config benchmarks/speed/asv.conf.json v0.1.0..main
    asv run --config benchmarks/speed/asv.conf.json --environment existing:.venv/bin/python

Only what is public since the first release is used, so that old commits can be measured. Counts
of network calls and stored values do not depend on the machine; times do.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

N_CELLS = 2_000


def counts(n_genes: int) -> sparse.csr_matrix:
    """Poisson counts at about 7% density, CSR, ``(N_CELLS, n_genes)``."""
    random = np.random.default_rng(0)
    rates = 0.025 * random.lognormal(0.0, 1.5, n_genes)
    return sparse.csr_matrix(random.poisson(rates, (N_CELLS, n_genes)).astype(np.float32))


class Stages:
    """A briefly trained model, and what can be asked of it."""

    params = (2_000, 8_000, 28_000)
    param_names = ("genes",)
    timeout = 600

    def setup(self, n_genes: int) -> None:
        """Train for an epoch; not timed."""
        import torch

        from cfgen_augment import CFGen

        torch.set_num_threads(1)
        self.X = counts(n_genes)
        self.labels = np.array(["A", "B"]).repeat(N_CELLS // 2)
        self.make = lambda: CFGen(max_epochs=1, random_state=0, device="cpu")
        self.model = self.make().fit(self.X, self.labels)
        self.model.generate(self.labels[:10], random_state=0)  # compiles

    def time_fit_one_epoch(self, n_genes: int) -> None:
        """One epoch of autoencoder and flow, with everything around them."""
        self.make().fit(self.X, self.labels)

    def time_encode(self, n_genes: int) -> None:
        """Counts to latents."""
        self.model.encode(self.X)

    def time_generate(self, n_genes: int) -> None:
        """As many cells as there are."""
        self.model.generate(self.labels, random_state=0)

    def peakmem_generate(self, n_genes: int) -> None:
        """Memory of the process."""
        self.model.generate(self.labels, random_state=0)

    def track_network_calls_per_generate(self, n_genes: int) -> int:
        """Evaluations of the velocity field by one call of `generate`."""
        calls = []
        handle = self.model.network_.field.inlet.register_forward_hook(lambda *_: calls.append(1))
        self.model.generate(self.labels, random_state=0)
        handle.remove()
        return len(calls)
