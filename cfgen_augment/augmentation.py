"""`augment` and `augment_file`: the sampler for AnnData, in memory and from file to file."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Iterator, Mapping
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cfgen_augment import __version__, annotated, checkpoint, files
from cfgen_augment.attributes import check_attribute
from cfgen_augment.counts import CellMatrix, append_rows, rows_like
from cfgen_augment.model import CFGen
from cfgen_augment.processes import Processes, launched
from cfgen_augment.sampler import CFGenSampler
from cfgen_augment.stored import in_order, stack_rows

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


def augment(
    adata: AnnData,
    label_key: str,
    *,
    target_size: int | float = 2.0,
    donor_key: str | None = None,
    batch_key: str | None = None,
    layer: str | None = None,
    sampling_strategy: str | float | Mapping | Any = "inverse-sqrt",
    exponent: float = 0.5,
    min_cells: int = 5,
    generator: CFGen | str | os.PathLike | None = None,
    covariates_from: str = "label",
    likelihood: str = "nb",
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
) -> AnnData:
    """Add generated cells to AnnData, rare types first.

    Parameters
    ----------
    adata
        Real cells with raw counts, shape ``(n_obs, n_vars)``; not modified. Backed AnnData are
        learned from without reading their counts as a whole; the result is in memory.
    label_key
        Column of obs with the cells' types.
    target_size
        Cells in the result: an integer is a total, a float a multiple of ``n_obs``.
    donor_key, batch_key
        Columns of obs to condition on besides the label; filled in for generated cells.
    layer
        Layer with the raw counts; None uses ``X``.
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
    AnnData
        A new object: the real cells, unchanged and in their order, then the generated ones.

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
    if not annotated.is_anndata(adata):
        raise TypeError(
            f"adata: expected AnnData; got {type(adata).__name__}. For arrays and DataFrames use "
            "CFGenSampler."
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
        device=device,
        distributed=distributed,
        random_state=random_state,
        verbose=verbose,
    )
    # In several processes each generates the whole result, which is to be in its memory.
    together = launched(distributed, device)
    with together.first_speaks():
        blocks, columns = _train(
            sampler, adata, keys, key_added, save_model, overwrite_model, together
        )
        cells = stack_rows(list(blocks))
        result = annotated.append_cells(adata, cells, layer, key=key_added, columns=columns)
    result.uns["cfgen_augment"] = _provenance(sampler, keys, key_added, result, label_key)
    return result


def augment_file(
    input: str | os.PathLike,
    output: str | os.PathLike,
    label_key: str,
    *,
    target_size: int | float = 2.0,
    donor_key: str | None = None,
    batch_key: str | None = None,
    layer: str | None = None,
    sampling_strategy: str | float | Mapping | Any = "inverse-sqrt",
    exponent: float = 0.5,
    min_cells: int = 5,
    generator: CFGen | str | os.PathLike | None = None,
    covariates_from: str = "label",
    likelihood: str = "nb",
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
) -> AnnData:
    """Add generated cells to an h5ad or zarr file, block by block.

    What is written is what `augment` returns for the same seed: annotation, provenance, layers
    and dtypes. Neither the input's counts nor the result are ever in memory as a whole, unless the
    input's counts are stored by columns (CSC).

    Parameters
    ----------
    input
        File with the real cells: h5ad, or a directory with a zarr store.
    output
        File to write, ``.h5ad`` or ``.zarr``. It appears complete or not at all; a link stays one.
    label_key, target_size, donor_key, batch_key, layer, sampling_strategy, exponent, min_cells
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
    AnnData
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
        device=device,
        distributed=distributed,
        random_state=random_state,
        verbose=verbose,
    )
    together = launched(distributed, device)
    share = together.rank, together.size
    result: AnnData | None = None
    with together.first_speaks():
        with contextlib.ExitStack() as stack:
            # The first process alone writes; when the stack unwinds the output is in its place.
            place = (
                stack.enter_context(files.replacing(Path(output))) if together.is_first else None
            )
            adata = stack.enter_context(files.opened(Path(input)))
            blocks, columns = _train(
                sampler, adata, keys, key_added, save_model, overwrite_model, together, share
            )
            if together.size > 1:
                blocks = _through_shards(blocks, place, together)
            with together.all_or_none():
                if place is not None:
                    result = _write(
                        sampler, adata, layer, keys, key_added, blocks, columns, place, Path(output)
                    )
        written: AnnData = together.agree(result)
    return written


def _through_shards(
    blocks: Iterator[CellMatrix], place: Path | None, together: Processes
) -> Iterator[CellMatrix]:
    """Write one's own blocks beside the output, and read everyone's, in order.

    Cells go from process to process by way of the disk; no memory holds more than a block.
    """
    beside = Path(together.agree(str(place)))
    shards = [beside.with_name(f"{beside.name}-{rank}") for rank in range(together.size)]
    with together.first_repeats(), together.all_or_none():
        files.write_shard(shards[together.rank], blocks)
    return files.read_shards(shards)


def _write(
    sampler: CFGenSampler,
    adata: AnnData,
    layer: str | None,
    keys: Mapping[str, str | None],
    key_added: str,
    blocks: Iterator[CellMatrix],
    columns: Mapping[str, NDArray],
    place: Path,
    output: Path,
) -> AnnData:
    """Write real and generated cells to `place`, which is to become `output`."""
    label_key = str(keys["label_key"])
    real = annotated.counts(adata, layer)
    result, layers, dropped = annotated.extended(
        adata, real, len(columns[label_key]), layer, key=key_added, columns=columns
    )
    result.uns["cfgen_augment"] = _provenance(sampler, keys, key_added, result, label_key)
    if dropped:
        warnings.warn(dropped, UserWarning, stacklevel=3)
    if getattr(real, "format", "csr") == "csc":  # columns cannot grow row by row
        result.X = append_rows(real, stack_rows(list(blocks)))
        for name in layers:
            result.layers[name] = result.X
        files.write_whole(result, place, named=output)
        del result.X, result.layers
        return result
    cells = itertools.chain(
        (block for _, block in in_order(real)),
        (rows_like(b, real.dtype, is_sparse=annotated.is_sparse(real)) for b in blocks),
    )
    files.write(result, place, cells, layers, named=output)
    return result


def _train(
    sampler: CFGenSampler,
    adata: AnnData,
    keys: Mapping[str, str | None],
    key_added: str,
    save_model: str | os.PathLike | None,
    overwrite_model: bool,
    together: Processes,
    share: tuple[int, int] = (0, 1),
) -> tuple[Iterator[CellMatrix], dict[str, NDArray]]:
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
        role: check_attribute(annotated.obs_column(adata, key, role), f"obs[{key!r}]")
        for role, key in keys.items()
        if key is not None
    }
    annotated.check_extendable(adata, key_added)
    blocks, labels = sampler.synthesise_blocks(
        adata,
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
            columns[key] = sampler.covariates_[name][adata.n_obs :]
    return blocks, columns


def summary(
    augmented: AnnData, label_key: str, key_added: str = annotated.SYNTHETIC
) -> pd.DataFrame:
    """Cells per type before and after augmentation.

    Returns
    -------
    DataFrame
        One row per type, rarest first: ``real``, ``synthetic``, ``total``, and the shares of
        the data in per cent before and after.
    """
    import pandas as pd

    synthetic = augmented.obs[key_added].to_numpy()
    labels = augmented.obs[label_key].astype(str).to_numpy()
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
    result: AnnData,
    label_key: str,
) -> dict[str, Any]:
    """What was done, in types that every h5ad reader knows."""
    model = sampler.generator_
    given = sampler.get_params(deep=False)
    # What a generator was trained with counts, not what the sampler would have trained one with.
    given |= {name: getattr(model, name) for name in given if hasattr(model, name)}
    given["device"] = str(model.device_)
    if isinstance(sampler.generator, CFGen):
        given["generator"] = type(model).__name__
    parameters = {}
    for name, value in {**keys, **given}.items():
        if value is None or name in ("random_state", "verbose", "distributed"):
            continue
        plain = isinstance(value, (str, bool, Number))
        parameters[name] = value if plain else getattr(value, "__name__", str(value))
    table = summary(result, label_key, key_added)
    return {
        "version": __version__,
        "seed": sampler.random_seed_,
        "parameters": parameters,
        "key_added": key_added,
        "types": table.index.to_numpy(dtype=str),
        "n_real": table["real"].to_numpy(),
        "n_synthetic": table["synthetic"].to_numpy(),
    }
