"""A saved model: a directory with safetensors weights and a JSON configuration.

Neither format can carry code. The configuration keeps checksums of the weights and of itself, so
a truncated, mixed-up or edited directory is noticed before anything is built from it. Writing is
atomic: the directory appears complete or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from cfgen_augment import __version__

FORMAT = 4
WEIGHTS = "weights.safetensors"
CONFIG = "config.json"
_RECORDED = ("torch", "numpy", "scipy", "safetensors")
_CHECKSUM = "config_sha256"


def check_destination(directory: Path, *, overwrite: bool) -> None:
    """Raise if saving to `directory` could lose anything of the user's.

    Raises
    ------
    FileExistsError
        If something is there and `overwrite` is false, or it is not a saved model.
    OSError
        If nothing could be written there.
    """
    directory = directory.resolve()
    # Asked before training starts, so what would make saving fail afterwards is refused here.
    parent = next((p for p in directory.parents if p.exists()), directory)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OSError(
            f"{directory}: expected a place that can be written to; {parent} is not a directory "
            "with that permission. Choose another directory."
        )
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not directory.is_dir() or {p.name for p in directory.iterdir()} != {WEIGHTS, CONFIG}:
        raise FileExistsError(
            f"{directory}: expected a new or empty directory, or a saved model; found other "
            "files there, which are never overwritten. Choose another directory."
        )
    if not overwrite:
        raise FileExistsError(
            f"{directory}: expected a new or empty directory; a saved model is already there. "
            "Choose another directory, or allow overwriting it (overwrite=True, "
            "overwrite_model=True, --force)."
        )


def save(
    directory: Path, tensors: dict[str, Tensor], config: dict[str, Any], *, overwrite: bool
) -> Path:
    """Write `tensors` and `config` to `directory`; see `CFGen.save` for the errors."""
    check_destination(directory, overwrite=overwrite)
    weights = save_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    versions = {"cfgen-augment": __version__} | {name: version(name) for name in _RECORDED}
    document = {
        "format": FORMAT,
        "versions": versions,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        **config,
    }
    document = json.loads(json.dumps(document, default=_plain))
    document[_CHECKSUM] = _checksum(document)
    destination = directory.resolve()  # through a link, which stays one
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=destination.parent, prefix=f".{destination.name}-"
    ) as made:
        complete, previous = Path(made) / "model", Path(made) / "previous"
        complete.mkdir()
        (complete / WEIGHTS).write_bytes(weights)
        (complete / CONFIG).write_text(json.dumps(document, indent=1), encoding="utf-8")
        replaces = destination.exists()
        if replaces:
            os.replace(destination, previous)
        try:
            os.replace(complete, destination)
        except BaseException:
            if replaces:
                os.replace(previous, destination)
            raise
    return directory


def load(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote, on the CPU.

    Raises
    ------
    FileNotFoundError
        If a file is not there.
    ValueError
        If a file is not what `save` wrote.
    """
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory}: expected a directory with {CONFIG} and {WEIGHTS}, as written by "
                f"CFGen.save; {name} is not there. Check the path."
            )
    try:
        document = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        found, versions = document["format"], document["versions"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{directory / CONFIG}: expected the configuration of a saved model; it is damaged "
            f"({error}). Save the model again."
        ) from error
    if found != FORMAT:
        raise ValueError(
            f"{directory / CONFIG}: expected format {FORMAT}; got {found!r}. Load it with the "
            f"version that wrote it (recorded: {versions})."
        )
    if document.pop(_CHECKSUM, None) != _checksum(document):
        raise ValueError(
            f"{directory / CONFIG}: expected the configuration as it was saved; the checksum "
            "differs, so the file was edited or damaged. Copy or save the model again."
        )
    weights = (directory / WEIGHTS).read_bytes()
    if hashlib.sha256(weights).hexdigest() != document["weights_sha256"]:
        raise ValueError(
            f"{directory / WEIGHTS}: expected the weights that {CONFIG} describes; the checksum "
            "differs, so the file is truncated or belongs to another model. Copy it again."
        )
    try:
        return load_tensors(weights), document
    except SafetensorError as error:
        raise ValueError(
            f"{directory / WEIGHTS}: expected a safetensors file; it is damaged ({error})."
        ) from error


def _checksum(document: dict[str, Any]) -> str:
    """Of the content, whatever its layout on the page."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _plain(value: object) -> object:
    """NumPy scalars and mappings among the parameters, as JSON knows them."""
    if hasattr(value, "item"):
        return value.item()
    if hasattr(value, "items"):
        return dict(value.items())
    raise TypeError(f"cannot save {type(value).__name__} {value!r} in a model's configuration")
