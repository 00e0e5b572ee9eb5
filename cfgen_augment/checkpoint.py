"""A saved model: a directory with safetensors weights and a JSON configuration.

Neither format can carry code. The configuration keeps a checksum of the weights, so a truncated
or mixed-up directory is noticed before anything is built from it. Writing is atomic: the
directory appears complete or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

FORMAT = 1
WEIGHTS = "weights.safetensors"
CONFIG = "config.json"
_RECORDED = ("cfgen-augment", "torch", "numpy", "scipy")


def check_destination(directory: Path, *, overwrite: bool) -> None:
    """Raise if saving to `directory` could lose anything of the user's.

    Raises
    ------
    FileExistsError
        If something is there and `overwrite` is false, or it is not a saved model.
    """
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
            "Choose another directory, or pass overwrite=True (--force)."
        )


def save(
    directory: Path, tensors: dict[str, Tensor], config: dict[str, Any], *, overwrite: bool
) -> Path:
    """Write `tensors` and `config` to `directory`; see `CFGen.save` for the errors."""
    check_destination(directory, overwrite=overwrite)
    weights = save_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    document = {
        "format": FORMAT,
        "versions": {package: version(package) for package in _RECORDED},
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        **config,
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as made:
        complete = Path(made) / "model"
        complete.mkdir()
        (complete / WEIGHTS).write_bytes(weights)
        (complete / CONFIG).write_text(json.dumps(document, indent=1, default=_plain))
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(complete, directory)
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
        document = json.loads((directory / CONFIG).read_text())
        found = document["format"]
        checksum = document["weights_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{directory / CONFIG}: expected the configuration of a saved model; it is damaged "
            f"({error}). Save the model again."
        ) from error
    if found != FORMAT:
        raise ValueError(
            f"{directory / CONFIG}: expected format {FORMAT}; got {found!r}. Load it with the "
            f"version that wrote it ({document.get('versions', {}).get('cfgen-augment')})."
        )
    weights = (directory / WEIGHTS).read_bytes()
    if hashlib.sha256(weights).hexdigest() != checksum:
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


def _plain(value: object) -> object:
    """NumPy scalars and mappings among the parameters, as JSON knows them."""
    if hasattr(value, "item"):
        return value.item()
    if hasattr(value, "items"):
        return dict(value.items())
    raise TypeError(f"cannot save {type(value).__name__} {value!r} in a model's configuration")
