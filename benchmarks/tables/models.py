"""What the tables compare: how every model is trained, and how it makes cells.

Entries with the same `fit` share what it trained. Rivals trained on cells without types are given
the same type for all, so that nothing of them depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from benchmarks.cells import New, Training
from benchmarks.rivals import oversampling
from benchmarks.tables.cells import ATAC, RNA, Measured
from cfgen_augment import CFGen

_ANY = "any"  # the type of all cells where types are not to be seen


@dataclass(frozen=True)
class Job:
    """What a model may see, and what it is to make.

    Attributes
    ----------
    cells
        Training cells.
    wanted
        Cells to make of each type.
    seed
        Of all randomness of the model.
    """

    cells: Measured
    wanted: Mapping[str, int]
    seed: int

    @property
    def labels(self) -> NDArray:
        """Types of the cells to make, sorted."""
        return np.repeat(list(self.wanted), list(self.wanted.values()))

    def training(self, *, labelled: bool = True) -> Training:
        """RNA as the benchmark's rivals take it; all of one type unless `labelled`."""
        cells, wanted = self.cells.one(RNA), dict(self.wanted)
        if not labelled:
            cells = replace(cells, labels=np.full(len(cells), _ANY))
            wanted = {_ANY: sum(wanted.values())}
        return Training(cells, cells.take(np.arange(0)), wanted, self.seed)


@dataclass(frozen=True)
class Made:
    """Cells that a model made.

    Attributes
    ----------
    values
        By modality: counts, or log-normalised values where `logged`.
    labels
        Their types; None if they were made without.
    logged
        Whether `values` are ``log(1 + 1e4 x / total)``.
    """

    values: Mapping[str, sparse.csr_matrix]
    labels: NDArray | None
    logged: bool = False


@dataclass(frozen=True)
class Model:
    """A row of a table.

    Attributes
    ----------
    title
        Its name in the table.
    about
        What it is, after whom.
    make
        Cells from the job and from what `fit` returned.
    fit
        Trains what `make` needs; None if there is nothing to share.
    typed
        Whether cells are made with types.
    """

    title: str
    about: str
    make: Callable[[Job, Any], Made]
    fit: Callable[[Job], Any] | None = None
    typed: bool = True


def real(job: Job, _: Any = None) -> Made:
    """Random training cells themselves, as many of each type."""
    random = np.random.default_rng([job.seed, 1])
    rows = [
        random.choice(np.flatnonzero(job.cells.labels == name), n, replace=False)
        for name, n in job.wanted.items()
    ]
    chosen = job.cells.take(np.concatenate(rows))
    return Made(chosen.counts, chosen.labels)


def _as_given(cells: Measured) -> Any:
    """Counts as a user would pass them: one modality by itself."""
    return dict(cells.counts) if len(cells.counts) > 1 else cells.counts[RNA]


def _fit_cfgen(job: Job) -> CFGen:
    return CFGen(random_state=job.seed).fit(_as_given(job.cells), job.cells.labels)


def _cfgen(job: Job, fitted: CFGen) -> Made:
    return Made(_named(fitted.generate(job.labels, random_state=job.seed)), job.labels)


def _cfgen_untyped(job: Job, fitted: CFGen) -> Made:
    made = fitted.generate(n_cells=len(job.labels), random_state=job.seed)
    return Made(_named(made), None)


def _encoded(job: Job, fitted: CFGen, *, typed: bool) -> Made:
    """CFGen without its flow, sampled as `_AGGREGATE` says: what its decoder could do."""
    random = np.random.default_rng([job.seed, 3])
    if typed:
        rows = [
            random.choice(np.flatnonzero(job.cells.labels == name), n)
            for name, n in job.wanted.items()
        ]
    else:
        rows = [random.choice(len(job.cells), len(job.labels))]
    chosen = job.cells.take(np.concatenate(rows))
    # Totals by name of the modality, or those of one.
    totals = {name: np.asarray(own.sum(axis=1)).ravel() for name, own in chosen.counts.items()}
    made = fitted.generate(
        job.labels if typed else None,
        n_cells=None if typed else len(job.labels),
        latents=fitted.encode(_as_given(chosen)),
        size_factors=totals if len(totals) > 1 else totals[RNA],
        random_state=job.seed,
    )
    return Made(_named(made), job.labels if typed else None)


def _named(values: Any) -> dict[str, sparse.csr_matrix]:
    return values if isinstance(values, dict) else {RNA: values}


def _of_rna(new: New, *, typed: bool) -> Made:
    return Made({RNA: new.values}, new.labels if typed else None, new.logged)


def _rival(rival: Callable[[Training], New], *, typed: bool = True) -> Callable[[Job, Any], Made]:
    """A rival of the benchmark, trained and asked in one go."""

    def make(job: Job, _: Any) -> Made:
        return _of_rna(rival(job.training(labelled=typed)), typed=typed)

    return make


def _diffusion(training: Training) -> New:
    from benchmarks.rivals.diffusion import latent_diffusion

    return latent_diffusion(training)


def _wgan(training: Training) -> New:
    from benchmarks.rivals.wgan import conditional_wgan

    return conditional_wgan(training)


def _fit_scvi(job: Job) -> Any:
    from benchmarks.rivals.scvi import fit

    return fit(job.training())


def _fit_scvi_untyped(job: Job) -> Any:
    from benchmarks.rivals.scvi import fit

    return fit(job.training(labelled=False))


def _scvi(latents: str, *, typed: bool = True) -> Callable[[Job, Any], Made]:
    def make(job: Job, fitted: Any) -> Made:
        from benchmarks.rivals.scvi import draw

        return _of_rna(draw(job.training(labelled=typed), fitted, latents), typed=typed)

    return make


def _fit_multivi(job: Job) -> Any:
    from benchmarks.rivals.peaks import fit_multivi

    return fit_multivi(job.cells.counts[RNA], job.cells.counts[ATAC], job.cells.labels, job.seed)


def _fit_peakvi(job: Job) -> Any:
    from benchmarks.rivals.peaks import fit_peakvi

    return fit_peakvi(job.cells.counts[ATAC], job.cells.labels, job.seed)


def _peaks(latents: str) -> Callable[[Job, Any], Made]:
    def make(job: Job, fitted: Any) -> Made:
        from benchmarks.rivals.peaks import draw

        return Made(draw(fitted, job.wanted, latents, job.seed), job.labels)

    return make


def _independent(job: Job, _: Any) -> Made:
    """Genes and peaks drawn independently within each type: by moments, and by frequency."""
    random = np.random.default_rng([job.seed, 2])
    rows = []
    for name, n in job.wanted.items():
        opened = job.cells.counts[ATAC][job.cells.labels == name]
        rate = np.asarray(opened.mean(axis=0), dtype=np.float64).ravel()
        rows += [sparse.csr_matrix(random.random(len(rate)) < rate) for _ in range(n)]
    peaks = sparse.vstack(rows, format="csr", dtype=np.float32)
    genes = oversampling.negative_binomial(job.training())
    return Made({RNA: genes.values, ATAC: peaks}, job.labels)


_OURS = "our compact implementation after"
_SCVI = "scVI (doi:10.1038/s41592-018-0229-2) of scvi-tools"
_AGGREGATE = "latents from the posterior of random training cells"
_SC_DIFFUSION = f"latent diffusion, {_OURS} scDiffusion (doi:10.1093/bioinformatics/btae518)"
_SC_GAN = f"WGAN-GP, {_OURS} scGAN and cscGAN (doi:10.1038/s41467-019-14018-z)"

REAL = "real"
_REAL = Model("real cells", "as many training cells: the floor", real)
_ENCODED = Model(
    "CFGen, no flow",
    "the same model, latents and depths of random training cells of the type, decoded: the way of "
    "scVI's first row",
    partial(_encoded, typed=True),
    _fit_cfgen,
)

#: Rows of both tables by name, in order.
RNA_MODELS: dict[str, Model] = {
    REAL: _REAL,
    "cfgen": Model("CFGen", "CFGen at its defaults, given the type", _cfgen, _fit_cfgen),
    "cfgen-encoded": _ENCODED,
    "scvi": Model(
        "scVI",
        f"{_SCVI}, decoder given the type; {_AGGREGATE} of the type",
        _scvi("posterior"),
        _fit_scvi,
    ),
    "scvi-prior": Model(
        "scVI, prior",
        "the same model, latents from the prior, the way of the paper",
        _scvi("prior"),
        _fit_scvi,
    ),
    "scdiffusion": Model("scDiffusion (ours)", _SC_DIFFUSION, _rival(_diffusion)),
    "wgan": Model("scGAN (ours)", f"{_SC_GAN}, conditional", _rival(_wgan)),
    "nb": Model(
        "negative binomial",
        "genes independent within a type, by moments; not in the paper",
        _rival(oversampling.negative_binomial),
    ),
    "mixup": Model(
        "mixup",
        "two training cells of a type added and thinned by a half; not in the paper",
        _rival(oversampling.mixup),
    ),
    "cfgen-untyped": Model(
        "CFGen", "the same model as given types, asked without", _cfgen_untyped, _fit_cfgen, False
    ),
    "cfgen-encoded-untyped": Model(
        "CFGen, no flow",
        "the same model, latents and depths of random training cells, decoded",
        partial(_encoded, typed=False),
        _fit_cfgen,
        False,
    ),
    "scvi-untyped": Model(
        "scVI",
        f"{_SCVI}, types not seen; {_AGGREGATE}",
        _scvi("posterior", typed=False),
        _fit_scvi_untyped,
        False,
    ),
    "scvi-prior-untyped": Model(
        "scVI, prior",
        "the same model, latents from the prior",
        _scvi("prior", typed=False),
        _fit_scvi_untyped,
        False,
    ),
    "scdiffusion-untyped": Model(
        "scDiffusion (ours)",
        f"{_SC_DIFFUSION}, without its classifier",
        _rival(_diffusion, typed=False),
        typed=False,
    ),
    "wgan-untyped": Model(
        "scGAN (ours)",
        f"{_SC_GAN}, types not seen",
        _rival(_wgan, typed=False),
        typed=False,
    ),
    "nb-untyped": Model(
        "negative binomial",
        "genes independent, types not seen",
        _rival(oversampling.negative_binomial, typed=False),
        typed=False,
    ),
    "mixup-untyped": Model(
        "mixup",
        "two training cells added and thinned, types not seen",
        _rival(oversampling.mixup, typed=False),
        typed=False,
    ),
}
_MULTIVI = "MultiVI (doi:10.1038/s41592-023-01909-9) of scvi-tools, decoders given the type"
_PEAKVI = "PeakVI (doi:10.1016/j.crmeth.2022.100182) of scvi-tools, decoder given the type"
PAIRED_MODELS: dict[str, Model] = {
    REAL: _REAL,
    "cfgen": Model(
        "CFGen", "CFGen at its defaults, both modalities in one latent", _cfgen, _fit_cfgen
    ),
    "cfgen-encoded": _ENCODED,
    "multivi": Model("MultiVI", f"{_MULTIVI}; {_AGGREGATE}", _peaks("posterior"), _fit_multivi),
    "multivi-prior": Model(
        "MultiVI, prior",
        "the same model, latents from the prior",
        _peaks("prior"),
        _fit_multivi,
    ),
    "peakvi": Model("PeakVI", f"{_PEAKVI}; {_AGGREGATE}", _peaks("posterior"), _fit_peakvi),
    "peakvi-prior": Model(
        "PeakVI, prior", "the same model, latents from the prior", _peaks("prior"), _fit_peakvi
    ),
    "scvi": RNA_MODELS["scvi"],
    "scvi-prior": RNA_MODELS["scvi-prior"],
    "independent": Model(
        "independent features",
        "genes by a negative binomial, peaks by their frequency, within a type; not in the paper",
        _independent,
    ),
}
TABLES = {1: RNA_MODELS, 2: PAIRED_MODELS}
