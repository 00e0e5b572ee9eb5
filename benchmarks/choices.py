"""What CFGen's defaults were chosen among, each choice compared on training donors only.

    python -m benchmarks choices --data kang --splits 5 --seeds 1 --out choices/

Every split of ``python -m benchmarks run`` with the same data, seed and splits gives one inner
split: three in ten of its *training* donors are held out, types are thinned among the others,
and every choice is scored there. No part of a split looks at the donors that the split itself
holds out. The mean over several splits does: what one split holds out, another trains on, so
a default chosen by that mean knows of all donors a little. ``scores.csv`` has every split alone,
for choosing in each by itself.

``--choices`` names some of `CHOICES`; ``none`` (which gains are measured from) and the rivals
``nb`` and ``mixup`` are always among them. A choice changes one thing of the defaults unless its
text says otherwise. Choices that are trained alike share one training. Parts are kept as they are
finished, as by ``run``; the same command goes on where it stopped, and prints the table of all
that is there.

Gains are in F1, new cells against none, mean over inner splits: of the types made rare by
``--thin`` or, without it, those below 5% of the training cells; of the types not below; of all.
Classifiers are kNN (k = 10) and logistic regression on principal components, and logistic
regression on genes. W2 and MMD are means over the rare types; zeros and slope the largest
difference of one of them, in fraction of zeros and in slope of log variance on log mean, from
real cells of held-out donors, where a type of which a choice makes too few cells to compare is
left out; DCR is the closest-record ratio of `benchmarks.memorisation`.
``to defaults`` is what a choice gains for rare types beyond ``defaults`` in the same split, with
its standard deviation over splits.
``ahead of`` counts the inner splits in which kNN and LR on principal components together gain
more for rare types than the rival.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.ablation import unchanged
from benchmarks.arms import ARMS, Arm
from benchmarks.cells import New, Training, log_normalise
from benchmarks.classify import logistic_probability
from benchmarks.genes import allocation
from benchmarks.rivals import cfgen
from cfgen_augment import CFGen, model
from cfgen_augment.flow import VelocityField

ALWAYS = ("none", "nb", "mixup")
_CANDIDATES = 2  # cells generated for each that rejection keeps


@dataclass(frozen=True)
class Train:
    """How a choice is trained; equal ones share a training.

    Attributes
    ----------
    parameters
        Parameters of `CFGen` that are not its defaults, and their values.
    change
        Context to train in, for what no parameter changes.
    donors
        Whether donors are a second attribute.
    """

    parameters: tuple[tuple[str, Any], ...] = ()
    change: Callable[[], AbstractContextManager[None]] = unchanged
    donors: bool = False

    def __call__(self, training: Training) -> CFGen:
        """Train on the training cells."""
        fit = cfgen.fit_with_donors if self.donors else cfgen.fit
        with self.change():
            return fit(training, CFGen(**dict(self.parameters)))


@dataclass(frozen=True)
class Generate:
    """How a choice generates: with these parameters of `CFGen` in place of the fitted model's."""

    parameters: tuple[tuple[str, Any], ...]

    def __call__(self, training: Training, fitted: CFGen) -> New:
        """Cells of the fitted model, which is left as it was."""
        with mock.patch.multiple(fitted, **dict(self.parameters)):
            return cfgen.cfgen(training, fitted)


@dataclass(frozen=True)
class Allocate:
    """How many cells a choice adds of each type; see `benchmarks.genes.allocation`.

    Without a `target_size`, as many in all as were asked for.
    """

    target_size: float | None = None
    exponent: float = 0.5

    def __call__(self, training: Training, fitted: CFGen) -> New:
        """Cells of the fitted model, as many as that."""
        asked = len(training.cells) + sum(training.to_add.values())
        target = asked if self.target_size is None else self.target_size
        to_add = allocation(training.cells, target, exponent=self.exponent)
        return cfgen.cfgen(replace(training, to_add=to_add), fitted)


@contextmanager
def without_centres() -> Iterator[None]:
    """Train a flow that has to find every label from the same noise."""

    def centre_on(field: VelocityField, latents: Tensor, *_: object) -> None:
        field.start_without_centres(latents.device)

    with mock.patch.object(VelocityField, "centre_on", centre_on):
        yield


@contextmanager
def without_scales() -> Iterator[None]:
    """Train a flow around the labels' centres, all at the same scale."""
    original = VelocityField.centre_on

    def centre_on(field: VelocityField, *arguments: Any) -> None:
        original(field, *arguments)
        field.scales = torch.ones_like(field.scales)

    with mock.patch.object(VelocityField, "centre_on", centre_on):
        yield


@contextmanager
def epochs(autoencoder: float = 1.0, flow: float = 1.0) -> Iterator[None]:
    """Train for so many times the epochs that ``max_epochs="auto"`` means."""
    scaled = tuple(
        tuple(max(1, round(factor * number)) for number in numbers)
        for factor, numbers in zip((autoencoder, flow), model._AUTO_EPOCHS, strict=True)
    )
    with mock.patch.object(model, "_AUTO_EPOCHS", scaled):
        yield


def best_half(training: Training, fitted: CFGen) -> New:
    """Of twice as many cells, the half of each type most probable to a classifier of real cells.

    The classifier is a logistic regression on the training cells' log-normalised counts.
    """
    doubled = {name: _CANDIDATES * n for name, n in training.to_add.items()}
    new = cfgen.cfgen(replace(training, to_add=doubled), fitted)
    if not len(new):
        return new
    cells = training.cells
    probability = logistic_probability(
        log_normalise(cells.counts), cells.labels, log_normalise(new.values), new.labels
    )
    kept = np.zeros(len(new), dtype=bool)
    for name, n in training.to_add.items():
        rows = np.flatnonzero(new.labels == name)
        kept[rows[np.argsort(-probability[rows], kind="stable")][:n]] = True
    return New(new.values[kept], new.labels[kept])


def _trained(
    about: str,
    change: Callable[[], AbstractContextManager[None]] = unchanged,
    generate: dict[str, Any] | None = None,
    **parameters: Any,
) -> Arm:
    make = Generate(tuple(generate.items())) if generate else cfgen.cfgen
    return Arm(about, make, fit=Train(tuple(parameters.items()), change))


def _made(about: str, make: Callable[..., New], fit: Train | None = None) -> Arm:
    return Arm(about, make, fit=fit or Train())


def _generated(about: str, **parameters: Any) -> Arm:
    return _made(about, Generate(tuple(parameters.items())))


_DONORS = Train(donors=True)

# In the order of the table.
CHOICES: dict[str, Arm] = {
    **{name: ARMS[name] for name in (*ALWAYS, "oracle")},
    "defaults": _trained("CFGen at its defaults"),
    # What the autoencoder learns.
    "no count splitting": _trained("encoder sees the counts it explains", count_splitting=False),
    "no label head": _trained("autoencoder need not tell labels apart", label_weight=0.0),
    "label weight .002": _trained("a fifth of the default", label_weight=0.002),
    "label weight .05": _trained("five times the default", label_weight=0.05),
    "20 latents": _trained("instead of 50", n_latent=20),
    "dispersion per label": _trained("and gene", dispersion="gene-label"),
    # What the flow learns.
    "nothing pooled": _generated("every label as its own cells lie", pooling=0.0),
    "all pooled": _generated("every label as cells of all labels lie", pooling=1e9),
    "no centres": _trained("and nothing pooled", without_centres, {"pooling": 0.0}),
    "no label scales": _trained("centres, and one scale for all labels", without_scales),
    "the paper's recipe": _trained(
        "no count splitting, no label head, no centres, nothing pooled",
        without_centres,
        {"pooling": 0.0},
        count_splitting=False,
        label_weight=0.0,
    ),
    "flow without size factor": _trained(
        "latents do not depend on totals", condition_on_size_factor=False
    ),
    "shared size factors": _trained("totals of all labels alike", size_factor="shared"),
    # How long.
    "half autoencoder epochs": _trained("of the default", partial(epochs, autoencoder=0.5)),
    "double autoencoder epochs": _trained("the default", partial(epochs, autoencoder=2.0)),
    "double flow epochs": _trained("the default", partial(epochs, flow=2.0)),
    # How cells are generated.
    "temperature .7": _generated("standard deviation of the noise", temperature=0.7),
    "temperature .85": _generated("standard deviation of the noise", temperature=0.85),
    "guidance 1.5": _generated("away from cells of no label", guidance=1.5),
    "guidance 2": _generated("away from cells of no label", guidance=2.0),
    "20 steps": _generated("of the solver instead of 5", n_steps=20),
    "best half": _made("of twice as many, most probable to a classifier of real cells", best_half),
    # Whose style.
    "donors of the type": _made("donors seen, drawn as the type has them", cfgen.cfgen, _DONORS),
    "all donors": _made("donors seen, each as often for every type", cfgen.with_donors, _DONORS),
    "type x donor": _made(
        "the same, type and donor composed by Eq. 10",
        partial(cfgen.with_donors, composed=True),
        _DONORS,
    ),
    # No flow.
    "latents resampled": _made("no flow: real latents of the type", cfgen.autoencoder_resampled),
    "latents shrunk": _made("the same, half-way to the type's mean", cfgen.autoencoder_shrunk),
    "latents pooled": _made(
        "no flow: the type's centre, and how real cells of all types lie around theirs",
        cfgen.autoencoder_pooled,
    ),
    # How many cells of which type: types weigh n^-.5 by default.
    "exponent .25": _made("types weigh n^-.25", Allocate(exponent=0.25)),
    "exponent .75": _made("types weigh n^-.75", Allocate(exponent=0.75)),
    "exponent 1": _made("types weigh 1/n", Allocate(exponent=1.0)),
    "1.25 times the cells": _made("after augmentation", Allocate(1.25)),
    "1.5 times the cells": _made("after augmentation", Allocate(1.5)),
    "3 times the cells": _made("after augmentation", Allocate(3.0)),
}


def choose(names: Sequence[str], *, pool: bool, donors: bool) -> list[str]:
    """The choices to run, in the order of the table.

    Parameters
    ----------
    names
        Names of choices, or ``"all"`` for all that can run on the data.
    pool, donors
        As in `arms.choose`.

    Raises
    ------
    ValueError
        For a name that is not a choice, or a choice that cannot run on these data.
    """
    unknown = sorted(set(names) - set(CHOICES) - {"all"})
    if unknown:
        raise ValueError(
            f"--choices: expected any of {', '.join(map(repr, CHOICES))}, 'all'; got "
            f"{', '.join(map(repr, unknown))}. Quote names with spaces."
        )
    impossible = {
        name: "unused real cells of the training donors; pass --thin"
        for name in ("oracle",)
        if not pool
    } | {
        name: "cells with donors; these have none"
        for name, choice in CHOICES.items()
        if choice.fit == _DONORS and not donors
    }
    for name in names:
        if name in impossible:
            raise ValueError(f"--choices {name!r}: expected {impossible[name]}.")
    wanted = {*ALWAYS, *(set(CHOICES) - set(impossible) if "all" in names else names)}
    return [name for name in CHOICES if name in wanted]
