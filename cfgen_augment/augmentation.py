"""`augment` and `augment_file`: the sampler for AnnData, in memory and from file to file."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cfgen_augment import __version__, annotated, checkpoint, files, writing
from cfgen_augment.attributes import check_attribute
from cfgen_augment.containers import Container
from cfgen_augment.counts import rows_like
from cfgen_augment.generation import Cells
from cfgen_augment.modalities import by_name, each, stack
from cfgen_augment.model import CFGen
from cfgen_augment.multimodal import adapt, strip
from cfgen_augment.notices import notify
from cfgen_augment.processes import Processes, launched
from cfgen_augment.sampler import CFGenSampler
from cfgen_augment.stored import side_by_side

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from mudata import MuData

    # What has cells of one or several modalities; what comes out is the kind that came in.
    Annotated: TypeAlias = AnnData | MuData | Mapping[str, AnnData]


def augment(
    adata: Annotated,
    label_key: str,
    *,
    target_size: int | float = 2.0,
    donor_key: str | None = None,
    batch_key: str | None = None,
    layer: str | Mapping[str, str | None] | None = None,
    modalities: Sequence[str] | None = None,
    sampling_strategy: str | float | Mapping | Any = "inverse-sqrt",
    exponent: float = 0.5,
    min_cells: int = 5,
    generator: CFGen | str | os.PathLike | None = None,
    covariates_from: str = "label",
    likelihood: str | Mapping[str, str] = "auto",
    size_factor: str = "label",
    max_epochs: str | int | tuple[int, int] = "auto",
    solver: str | None = None,
    guidance: float | Mapping[str, float] | None = None,
    key_added: str = annotated.SYNTHETIC,
    save_model: str | os.PathLike | None = None,
    overwrite_model: bool = False,
    device: str = "auto",
    distributed: bool = False,
    random_state: int | np.random.RandomState | None = None,
    verbose: bool = False,
) -> Annotated:
    """Add generated cells to AnnData or MuData, rare types first.

    Parameters
    ----------
    adata
        Real cells with raw counts, shape ``(n_obs, n_vars)``; not modified. Backed AnnData are
        learned from without reading their counts as a whole; the result is in memory.

        Cells of several modalities are MuData, or a mapping from names of modalities to AnnData
        of the same cells, which are matched by obs_names, or AnnData with `modalities` in obsm.
    label_key
        Column of obs with the cells' types: of MuData that of ``mdata.obs``; of a mapping a column
        of one of its AnnData, or of several that agree.
    target_size
        Cells in the result: an integer is a total, a float a multiple of ``n_obs``.
    donor_key, batch_key
        Columns of obs to condition on besides the label; filled in for generated cells.
    layer, modalities
        As in `CFGenSampler`: the layer with the raw counts, where it is not ``X``; and what is a
        modality of AnnData, ``"X"`` and keys of obsm, if there are several.
    sampling_strategy, exponent, min_cells, generator, covariates_from, likelihood
        As in `CFGenSampler`.
    size_factor, max_epochs, solver, guidance, device, distributed, random_state, verbose
        As in `CFGenSampler`.
    key_added
        Column of obs that marks generated cells.
    save_model, overwrite_model
        Directory to save the model to, and whether a saved model there may be replaced.

    Returns
    -------
    AnnData, MuData or dict of AnnData
        A new object of the kind given: the real cells, unchanged and in their order, then the
        generated ones.

        ``X`` (and ``layers[layer]``)
            Raw counts.
        ``obs[key_added]``
            True for generated cells.
        ``obs[label_key]``, ``obs[donor_key]``, ``obs[batch_key]``
            Filled in for generated cells; every other column is missing there.
        ``uns["cfgen_augment"]``
            Version, seed, parameters, and cells per type before and after. Parameters at None
            are left out; those of the model are the ones it was trained with.

    Raises
    ------
    KeyError
        If a column of obs or a layer is not there.
    ValueError, TypeError
        If counts, annotation or parameters are not usable.
    FileNotFoundError
        If `generator` is a path and no model is saved there.
    FileExistsError, OSError
        If `save_model` is taken, or cannot be written to; before any training.

    Warns
    -----
    UserWarning
        Names what was dropped because it cannot hold for generated cells (obsm, obsp, other
        layers, raw), and types too small to generate.

    See Also
    --------
    augment_file : The same from file to file, for more cells than memory holds.
    CFGenSampler : The same inside scikit-learn pipelines.

    Examples
    --------
    >>> import anndata, numpy as np
    >>> from cfgen_augment import augment
    >>> rng = np.random.default_rng(0)
    >>> adata = anndata.AnnData(
    ...     rng.poisson(2.0, size=(60, 10)), obs={"cell_type": ["B"] * 50 + ["T"] * 10}
    ... )
    >>> adata.obs_names = [f"cell{i}" for i in range(60)]
    >>> augmented = augment(adata, "cell_type", max_epochs=2, random_state=0)
    >>> augmented.obs["is_synthetic"].sum()
    np.int64(60)
    """
    cells = adapt(adata, layer, modalities)
    if cells is None:
        raise TypeError(
            "adata: expected AnnData, MuData or a mapping from names of modalities to AnnData; got "
            f"{type(adata).__name__}. For an array or a DataFrame use CFGenSampler; wrap several "
            "in AnnData each, or use CFGen."
        )
    keys = {"label_key": label_key, "donor_key": donor_key, "batch_key": batch_key}
    sampler = CFGenSampler(
        sampling_strategy,
        target_size=target_size,
        exponent=exponent,
        min_cells=min_cells,
        generator=generator,
        covariates_from=covariates_from,
        likelihood=likelihood,
        size_factor=size_factor,
        max_epochs=max_epochs,
        solver=solver,
        guidance=guidance,
        layer=layer,
        modalities=modalities,
        device=device,
        distributed=distributed,
        random_state=random_state,
        verbose=verbose,
    )
    # In several processes each generates the whole result, which is to be in its memory.
    together = launched(distributed, device)
    with together.first_speaks():
        blocks, columns = _train(
            sampler, adata, cells, keys, key_added, save_model, overwrite_model, together
        )
        result, note = cells.append(stack(list(blocks)), key=key_added, columns=columns)
        if note:
            notify(note)
    cells.annotate(result, _provenance(sampler, keys, key_added, result))
    return result


def augment_file(
    input: str | os.PathLike,
    output: str | os.PathLike,
    label_key: str,
    *,
    target_size: int | float = 2.0,
    donor_key: str | None = None,
    batch_key: str | None = None,
    layer: str | Mapping[str, str | None] | None = None,
    modalities: Sequence[str] | None = None,
    sampling_strategy: str | float | Mapping | Any = "inverse-sqrt",
    exponent: float = 0.5,
    min_cells: int = 5,
    generator: CFGen | str | os.PathLike | None = None,
    covariates_from: str = "label",
    likelihood: str | Mapping[str, str] = "auto",
    size_factor: str = "label",
    max_epochs: str | int | tuple[int, int] = "auto",
    solver: str | None = None,
    guidance: float | Mapping[str, float] | None = None,
    key_added: str = annotated.SYNTHETIC,
    overwrite: bool = False,
    save_model: str | os.PathLike | None = None,
    overwrite_model: bool = False,
    device: str = "auto",
    distributed: bool = False,
    random_state: int | np.random.RandomState | None = None,
    verbose: bool = False,
) -> AnnData | MuData:
    """Add generated cells to an h5ad, h5mu or zarr file, block by block.

    What is written is what `augment` returns for the same seed: annotation, provenance, layers
    and dtypes. Neither the input's counts nor the result are ever in memory as a whole, unless the
    input's counts are stored by columns (CSC), or modalities keep their cells in different orders.

    Parameters
    ----------
    input
        File with the real cells: h5ad, h5mu for MuData, or a directory with a zarr store.
    output
        File to write, ``.h5ad`` or ``.zarr``, or ``.h5mu`` if that is what the input is. It appears
        complete or not at all; a link stays one.
    label_key, target_size, donor_key, batch_key, layer, modalities, sampling_strategy, exponent
        As in `augment`.
    min_cells
        As in `augment`.
    generator, covariates_from, likelihood, size_factor, max_epochs, solver, guidance, key_added
        As in `augment`.
    overwrite
        Whether a file at `output`, which may be the input, may be replaced.
    save_model, overwrite_model, device, random_state, verbose
        As in `augment`. A model is kept even if writing the result fails.
    distributed
        Whether several processes, started by ``torchrun`` or ``srun``, make this call to train
        one model and to generate its cells together, each a share of them. Each reads the
        input. The shares wait beside the output, in a directory that all processes must be able
        to write to, until the first process puts them together there.

    Returns
    -------
    AnnData or MuData
        Annotation of what was written (obs, var, uns), without the counts; in every process.

    Raises
    ------
    FileNotFoundError, UnreadableError
        If the input is not there, or not a complete file.
    FileExistsError
        If the output exists and may not be replaced; before anything is read.
    OSError
        If the output cannot be written.
    RuntimeError
        If another process failed to write.
    KeyError, ValueError, TypeError
        As `augment`; also if the output's name ends in something else.

    Warns
    -----
    UserWarning
        As `augment`.

    See Also
    --------
    augment : The same in memory.

    Examples
    --------
    >>> import anndata, numpy as np
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from cfgen_augment import augment_file
    >>> rng = np.random.default_rng(0)
    >>> adata = anndata.AnnData(
    ...     rng.poisson(2.0, size=(60, 10)), obs={"cell_type": ["B"] * 50 + ["T"] * 10}
    ... )
    >>> adata.obs_names = [f"cell{i}" for i in range(60)]
    >>> with TemporaryDirectory() as folder:
    ...     adata.write_h5ad(f"{folder}/in.h5ad")
    ...     written = augment_file(
    ...         f"{folder}/in.h5ad", f"{folder}/out.h5ad", "cell_type", max_epochs=2, random_state=0
    ...     )
    ...     anndata.read_h5ad(f"{folder}/out.h5ad").shape
    (120, 10)
    """
    files.check_output(Path(output), overwrite=overwrite)
    files.check_kinds(Path(input), Path(output))
    if save_model is not None:
        files.check_apart(Path(save_model), Path(output))
    keys = {"label_key": label_key, "donor_key": donor_key, "batch_key": batch_key}
    sampler = CFGenSampler(
        sampling_strategy,
        target_size=target_size,
        exponent=exponent,
        min_cells=min_cells,
        generator=generator,
        covariates_from=covariates_from,
        likelihood=likelihood,
        size_factor=size_factor,
        max_epochs=max_epochs,
        solver=solver,
        guidance=guidance,
        layer=layer,
        modalities=modalities,
        device=device,
        distributed=distributed,
        random_state=random_state,
        verbose=verbose,
    )
    together = launched(distributed, device)
    share = together.rank, together.size
    result: AnnData | MuData | None = None
    with together.first_speaks():
        with contextlib.ExitStack() as stack:
            # The first process alone writes; when the stack unwinds the output is in its place.
            place = (
                stack.enter_context(writing.replacing(Path(output))) if together.is_first else None
            )
            given = stack.enter_context(files.opened(Path(input)))
            cells = adapt(given, layer, modalities)
            assert cells is not None
            blocks, columns = _train(
                *(sampler, given, cells, keys, key_added, save_model, overwrite_model),
                *(together, share),
            )
            if together.size > 1:
                blocks = _through_shards(sampler, blocks, place, together)
            with together.all_or_none():
                if place is not None:
                    result = _write(
                        sampler, cells, keys, key_added, blocks, columns, place, Path(output)
                    )
        written: AnnData | MuData = together.agree(result)
    return written


def _through_shards(
    sampler: CFGenSampler, blocks: Iterator[Cells], place: Path | None, together: Processes
) -> Iterator[Cells]:
    """Write one's own blocks beside the output, and read everyone's, in order.

    Cells go from process to process by way of the disk; no memory holds more than a block.
    """
    layout = sampler.generator_.modalities_
    beside = Path(together.agree(str(place)))
    shards = [beside.with_name(f"{beside.name}-{rank}") for rank in range(together.size)]
    with together.first_repeats(), together.all_or_none():
        writing.write_shard(
            shards[together.rank], (each(layout, block, "block") for block in blocks)
        )
    return (by_name(layout, parts) for parts in writing.read_shards(shards))


def _write(
    sampler: CFGenSampler,
    cells: Container,
    keys: Mapping[str, str | None],
    key_added: str,
    blocks: Iterator[Cells],
    columns: Mapping[str, NDArray],
    place: Path,
    output: Path,
) -> AnnData | MuData:
    """Write real and generated cells to `place`, which is to become `output`."""
    if not cells.grows():  # columns cannot grow row by row
        result, note = cells.append(stack(list(blocks)), key=key_added, columns=columns)
        if note:
            notify(note)
        cells.annotate(result, _provenance(sampler, keys, key_added, result))
        writing.write_whole(result, place, named=output)
        return strip(result)
    n_new = len(columns[str(keys["label_key"])])
    result, places, dropped = cells.frame(n_new, key=key_added, columns=columns)
    cells.annotate(result, _provenance(sampler, keys, key_added, result))
    if dropped:
        notify(annotated.note_of(dropped))
    real = cells.real()
    layout = sampler.generator_.modalities_
    rows = itertools.chain(
        (parts for _, parts in side_by_side(real)),
        (
            [
                rows_like(part, own.dtype, is_sparse=annotated.is_sparse(own))
                for part, own in zip(each(layout, block, "block"), real, strict=True)
            ]
            for block in blocks
        ),
    )
    writing.write(result, place, rows, places, named=output)
    return result


def _train(
    sampler: CFGenSampler,
    given: Annotated,
    cells: Container,
    keys: Mapping[str, str | None],
    key_added: str,
    save_model: str | os.PathLike | None,
    overwrite_model: bool,
    together: Processes,
    share: tuple[int, int] = (0, 1),
) -> tuple[Iterator[Cells], dict[str, NDArray]]:
    """Check everything, train, and save the model.

    Returns
    -------
    blocks : iterator of matrices
        The `share` of the generated cells, not generated yet.
    columns : dict of str to ndarray
        Columns of obs that are generated with all of them.
    """
    if save_model is not None:
        with together.all_or_none():  # nobody goes on to write there before all have looked
            checkpoint.check_destination(Path(save_model), overwrite=overwrite_model)
    columns_used = [key for key in keys.values() if key is not None]
    if len(set(columns_used)) < len(columns_used):
        raise ValueError(
            f"label_key, donor_key, batch_key: expected different columns of obs; got {dict(keys)}"
            ". Leave out the key that repeats another."
        )
    values = {
        role: check_attribute(cells.obs_column(key, role), f"obs[{key!r}]")
        for role, key in keys.items()
        if key is not None
    }
    cells.check_extendable(key_added)
    blocks, labels = sampler.synthesise_blocks(
        given,
        values["label_key"],
        donor=values.get("donor_key"),
        batch=values.get("batch_key"),
        share=share,
    )
    if save_model is not None:
        together.gather(None)  # a model at that place may have been the generator
        with together.all_or_none():
            if together.is_first:
                sampler.generator_.save(save_model, overwrite=overwrite_model)
    columns = {str(keys["label_key"]): labels}
    for role, name in (("donor_key", "donor"), ("batch_key", "batch")):
        if (key := keys[role]) is not None:
            columns[key] = sampler.covariates_[name][cells.n_cells :]
    return blocks, columns


def summary(
    augmented: Annotated, label_key: str, key_added: str = annotated.SYNTHETIC
) -> pd.DataFrame:
    """Cells per type before and after augmentation, of what `augment` returned.

    Returns
    -------
    DataFrame
        One row per type, rarest first: ``real``, ``synthetic``, ``total``, and the shares of
        the data in per cent before and after.

    Raises
    ------
    KeyError
        If a column of obs is not there.
    """
    import pandas as pd

    parts = augmented.values() if isinstance(augmented, Mapping) else [augmented]
    obs = next((part.obs for part in parts if label_key in part.obs), None)
    if obs is None or key_added not in obs:
        raise KeyError(
            "label_key, key_added: expected columns of obs with the types and the mark of "
            f"generated cells; there are no {label_key!r} and {key_added!r}. Pass what augment "
            "returned, and the names that it was given."
        )
    synthetic = obs[key_added].to_numpy().astype(bool)
    labels = obs[label_key].astype(str).to_numpy()
    table = pd.DataFrame(
        {
            "real": pd.Series(labels[~synthetic]).value_counts(),
            "synthetic": pd.Series(labels[synthetic]).value_counts(),
        }
    )
    table = table.fillna(0).astype(int).sort_values(["real", "synthetic"])
    table["total"] = table["real"] + table["synthetic"]
    table["% before"] = (100 * table["real"] / table["real"].sum()).round(2)
    table["% after"] = (100 * table["total"] / table["total"].sum()).round(2)
    return table


def _provenance(
    sampler: CFGenSampler,
    keys: Mapping[str, str | None],
    key_added: str,
    result: Annotated,
) -> dict[str, Any]:
    """What was done, in types that every h5ad reader knows."""
    model = sampler.generator_
    given = sampler.get_params(deep=False)
    # What a generator was trained with counts, not what the sampler would have trained one with.
    given |= {name: getattr(model, name) for name in given if hasattr(model, name)}
    given["device"] = str(model.device_)
    if isinstance(sampler.generator, CFGen):
        given["generator"] = type(model).__name__
    likelihoods = [modality.likelihood for modality in model.modalities_]
    given["likelihood"] = by_name(model.modalities_, likelihoods)
    parameters = {}
    for name, value in {**keys, **given}.items():
        if value is None or name in ("random_state", "verbose", "distributed"):
            continue
        plain = isinstance(value, (str, bool, Number)) or name == "likelihood"
        parameters[name] = value if plain else getattr(value, "__name__", str(value))
    table = summary(result, str(keys["label_key"]), key_added)
    return {
        "version": __version__,
        "seed": sampler.random_seed_,
        "parameters": parameters,
        "key_added": key_added,
        "types": table.index.to_numpy(dtype=str),
        "n_real": table["real"].to_numpy(),
        "n_synthetic": table["synthetic"].to_numpy(),
    }
