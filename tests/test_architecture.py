"""The house: who may import whom, what an import costs, and that nothing happens at import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cfgen_augment

PACKAGE = Path(cfgen_augment.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

# From the foundations up: a room imports from rooms to its left only.
ORDER = [
    *("notices", "allocation", "stored", "counts", "attributes", "size_factors"),
    *("minibatch", "nb_loss", "sweep", "draws", "likelihoods", "modalities", "autoencoder"),
    *(
        "solver",
        "flow",
        "processes",
        "training",
        "stages",
        "network",
        "parameters",
        "checkpoint",
        "saved",
        "generation",
        "translation",
        "model",
    ),
    *("annotated", "containers", "multimodal", "sampler", "files", "writing", "augmentation"),
    *("measures", "pairs", "diagnosis", "plot", "report", "cli"),
]
ADAPTERS = {
    "sklearn": {"sampler", "measures", "diagnosis"},
    "imblearn": {"sampler"},
    "anndata": {"annotated", "files", "writing", "cli"},
    "mudata": {"multimodal"},
    "h5py": {"files", "writing"},
    "zarr": {"files", "writing"},
    "pandas": {"annotated", "augmentation", "diagnosis"},
    "matplotlib": {"plot", "report"},
    "torchdyn": {"solver"},
    "numba": {"sweep"},
    "lightning_fabric": {"processes"},
}


def imports(module: str) -> set[str]:
    """Everything a module imports anywhere, type checking aside."""
    found = set()
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "cfgen_augment":
            found |= {f"cfgen_augment.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def test_every_module_has_its_place():
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_no_arrow_points_back(module):
    own = {name.split(".")[1] for name in imports(module) if name.startswith("cfgen_augment.")}
    later = set(ORDER[ORDER.index(module) :])
    assert not (own - {"__version__"}) & later


@pytest.mark.parametrize("module", MODULES)
def test_adapters_stay_outside(module):
    roots = {name.split(".")[0] for name in imports(module)}
    for library, rooms in ADAPTERS.items():
        assert library not in roots or module in rooms


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, cfgen_augment; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = set(run(code).split())
    assert not loaded & {
        "torch",
        "numpy",
        "scipy",
        "sklearn",
        "imblearn",
        "anndata",
        "pandas",
        "numba",
        "matplotlib",
    }


def test_the_sampler_is_imported_without_what_only_some_need():
    code = "import sys, cfgen_augment; cfgen_augment.CFGenSampler; print(*sys.modules)"
    loaded = set(run(code).split())
    assert "torch" in loaded
    assert not loaded & {
        *("anndata", "mudata", "torchdyn", "h5py", "numba", "lightning_fabric", "matplotlib"),
    }


def test_public_names():
    assert set(cfgen_augment.__all__) <= set(dir(cfgen_augment))
    with pytest.raises(AttributeError, match="no attribute 'CFGAN'"):
        cfgen_augment.CFGAN  # noqa: B018
