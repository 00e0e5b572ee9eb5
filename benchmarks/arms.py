"""What is compared: every way of making rare types heavier, under the name it has in tables.

All arms get the same training cells and the same number of new cells per type. Arms with the
same `fit` share its result, so that the autoencoder-only arms decode with the very autoencoder
that CFGen generated with.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cells import New, Training
from benchmarks.rivals import cfgen, oversampling


@dataclass(frozen=True)
class Arm:
    """One way of augmenting.

    Attributes
    ----------
    about
        What it does, with its source, for reports.
    make
        Makes the new cells from the training side, and from what `fit` returned if there is one.
    fit
        Trains what `make` needs; None for arms with nothing to train.
    seedless
        The same for every seed, so run once per split.
    extra
        Left out unless named: trains a deep rival, or needs more than the usual installation.
    needs
        A module that has to be installed for it.
    real
        Adds real cells of the pool, so that asking whether it memorised them has no meaning.
    """

    about: str
    make: Callable[..., New]
    fit: Callable[[Training], Any] | None = None
    seedless: bool = False
    extra: bool = False
    needs: str | None = None
    real: bool = False


def _latent_diffusion(training: Training) -> New:
    from benchmarks.rivals.diffusion import latent_diffusion

    return latent_diffusion(training)


def _wgan(training: Training) -> New:
    from benchmarks.rivals.wgan import conditional_wgan

    return conditional_wgan(training)


def _scvi(training: Training) -> New:
    from benchmarks.rivals.scvi import scvi

    return scvi(training)


def _scanvi(training: Training) -> New:
    from benchmarks.rivals.scvi import scanvi

    return scanvi(training)


# In the order of every table: nothing first, what is cheap, what is deep, CFGen, the oracle.
ARMS: dict[str, Arm] = {
    "none": Arm(
        "real training cells only; what gains are measured from", oversampling.none, seedless=True
    ),
    "reweight": Arm(
        "no new cells: types weigh in the classifiers as if they had been added",
        oversampling.reweight,
        seedless=True,
    ),
    "ros": Arm("RandomOverSampler of imbalanced-learn: copies", oversampling.random_oversampling),
    "smote-log": Arm("SMOTE (Chawla et al. 2002) on log-normalised values", oversampling.smote_log),
    "smote-counts": Arm("SMOTE on raw counts, rounded", oversampling.smote_counts),
    "nb": Arm(
        "independent negative binomial per type and gene, by moments",
        oversampling.negative_binomial,
    ),
    "mixup": Arm("two cells of a type added and thinned by a half, binomially", oversampling.mixup),
    "loras": Arm(
        "LoRAS (Bej et al. 2021, doi:10.1007/s10994-020-05913-4) on log-normalised values, as in "
        "sc-SynO (doi:10.1186/s12859-021-04469-x)",
        oversampling.loras,
    ),
    "scvi": Arm(
        "scVI (doi:10.1038/s41592-018-0229-2), decoder conditioned on type",
        _scvi,
        extra=True,
        needs="scvi",
    ),
    "scanvi": Arm("scANVI (doi:10.15252/msb.20209620)", _scanvi, extra=True, needs="scvi"),
    "scdiffusion": Arm(
        "latent diffusion on normalised values as in scDiffusion "
        "(doi:10.1093/bioinformatics/btae518), compact",
        _latent_diffusion,
        extra=True,
    ),
    "wgan": Arm(
        "conditional WGAN-GP as in cscGAN (doi:10.1038/s41467-019-14018-z), compact",
        _wgan,
        extra=True,
    ),
    "ae-resampled": Arm(
        "CFGen's autoencoder without its flow: real latents of the type, drawn again",
        cfgen.autoencoder_resampled,
        fit=cfgen.fit,
    ),
    "ae-interpolated": Arm(
        "the same, between two real latents of the type",
        cfgen.autoencoder_interpolated,
        fit=cfgen.fit,
    ),
    "ae-shrunk": Arm(
        "the same, real latents moved half-way to the type's mean",
        cfgen.autoencoder_shrunk,
        fit=cfgen.fit,
    ),
    "cfgen": Arm("CFGen at its defaults", cfgen.cfgen, fit=cfgen.fit),
    "cfgen-donors": Arm(
        "CFGen trained with donors as a second attribute",
        cfgen.cfgen,
        fit=cfgen.fit_with_donors,
        extra=True,
    ),
    "oracle": Arm(
        "unused real cells of the same donors and types, as many as there are up to the number",
        oversampling.oracle,
        real=True,
    ),
}


def choose(names: Sequence[str], *, pool: bool, donors: bool) -> list[str]:
    """The arms to run, in the order of the tables.

    Parameters
    ----------
    names
        Names of arms, ``"default"`` for all but the extras, ``"all"`` for all that can run here.
        ``none`` is always among them.
    pool
        Whether there are unused real cells enough for the oracle to mean anything.
    donors
        Whether cells have donors.

    Raises
    ------
    ValueError
        For a name that is not an arm, or an arm that cannot run on these data.
    ImportError
        For an arm whose package is not installed.
    """
    wanted = set(names) - {"default", "all"}
    unknown = sorted(wanted - set(ARMS))
    if unknown:
        raise ValueError(
            f"--arms: expected any of {', '.join(ARMS)}, default, all; got {', '.join(unknown)}."
        )
    if "oracle" in wanted and not pool:
        raise ValueError(
            "--arms oracle: expected unused real cells of the training donors; there are none "
            "that would double a type. Make types rare with --thin, or set cells aside with "
            "--reserve 0.5."
        )
    if "cfgen-donors" in wanted and not donors:
        raise ValueError("--arms cfgen-donors: expected cells with donors; these data have none.")
    for name in sorted(wanted):
        needed = ARMS[name].needs
        if needed and importlib.util.find_spec(needed) is None:
            raise ImportError(
                f"--arms {name}: needs the package {needed}, which is not installed. "
                f"pip install 'cfgen-augment[{needed}]'."
            )
    for name, arm in ARMS.items():
        possible = (
            (name != "oracle" or pool)
            and (name != "cfgen-donors" or donors)
            and not (arm.needs and importlib.util.find_spec(arm.needs) is None)
        )
        if possible and ("all" in names or ("default" in names and not arm.extra)):
            wanted.add(name)
    return [name for name in ARMS if name in wanted | {"none"}]
