"""The command ``cfgen-augment IN.h5ad OUT.h5ad``, or h5mu: parse, augment, report."""

from __future__ import annotations

import argparse
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfgen_augment import __version__

OK = 0
BAD_INPUT = 2  # what argparse exits with, too
OUTPUT_EXISTS = 3
UNREADABLE = 4
FAILED = 5
INTERRUPTED = 130

_EPILOG = f"""exit codes: {OK} done; {BAD_INPUT} bad usage or unusable data; {OUTPUT_EXISTS} output,
report or saved model exists, without --force; {UNREADABLE} input or model cannot be read;
{FAILED} training or writing failed; {INTERRUPTED} interrupted. The output appears complete or not
at all."""
_LIKELIHOODS = ("auto", "nb", "poisson", "bernoulli")
_TRAINING = ("likelihood", "size_factor", "max_epochs")  # options that a saved model has decided


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(
        prog="cfgen-augment",
        description="Add generated cells to a file of raw counts, rare types first.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    made.add_argument(
        "input",
        metavar="IN.h5ad",
        type=Path,
        help="real cells with raw counts; h5ad, h5mu or zarr",
    )
    made.add_argument(
        "output",
        metavar="OUT.h5ad",
        type=Path,
        help="where to write the result; .h5ad or .zarr, and .h5mu if the input is",
    )
    made.add_argument("--label-key", required=True, metavar="KEY", help="column of obs with types")
    made.add_argument("--donor-key", metavar="KEY", help="column of obs to condition on as well")
    made.add_argument("--batch-key", metavar="KEY", help="column of obs to condition on as well")
    made.add_argument(
        "--layer",
        type=_by_modality,
        metavar="NAME",
        help="layer with the raw counts (default: X); of h5mu also RNA=NAME,ATAC=NAME",
    )
    made.add_argument(
        "--modalities",
        type=lambda text: text.split(","),
        metavar="X,NAME",
        help="of h5ad with several modalities: which they are, X and keys of obsm",
    )
    made.add_argument(
        "--target-size",
        type=_target_size,
        default=2.0,
        metavar="N",
        help="cells in the result: a whole number is a total, 2.0 doubles the data (default: 2.0)",
    )
    made.add_argument(
        "--exponent",
        type=float,
        default=0.5,
        help="types get shares proportional to n ** -EXPONENT (default: 0.5)",
    )
    made.add_argument(
        "--min-cells",
        type=int,
        default=5,
        metavar="N",
        help="do not generate types with fewer real cells (default: 5)",
    )
    made.add_argument(
        "--likelihood",
        type=_likelihood,
        default="auto",
        metavar="NAME",
        help="noise model: nb, poisson, bernoulli, or auto, which is nb but for modalities of "
        "zeros and ones; of several modalities also RNA=NAME,ATAC=NAME (default: auto)",
    )
    made.add_argument(
        "--size-factor",
        choices=["shared", "label", "donor", "batch"],
        default="label",
        help="what total counts depend on (default: label)",
    )
    made.add_argument(
        "--covariates-from",
        choices=["label", "all"],
        default="label",
        help="draw a generated cell's donor from cells of its type, or from all (default: label)",
    )
    made.add_argument(
        "--guidance", type=float, metavar="W", help="guidance weight of every attribute"
    )
    made.add_argument(
        "--max-epochs", type=int, metavar="N", help="most epochs of both stages (default: auto)"
    )
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    made.add_argument(
        "--distributed",
        action="store_true",
        help="share the work among processes started by torchrun or srun",
    )
    made.add_argument("--seed", type=int, metavar="N", help="seed; the same seed, the same cells")
    model = made.add_mutually_exclusive_group()
    model.add_argument("--save-model", type=Path, metavar="DIR", help="keep the trained model")
    model.add_argument("--model", type=Path, metavar="DIR", help="use a saved model, do not train")
    made.add_argument(
        "--report",
        type=Path,
        metavar="FILE.html",
        help="compare generated with real cells, type by type, on one page",
    )
    made.add_argument(
        "--force", action="store_true", help="overwrite output, report and saved model"
    )
    made.add_argument(
        "--quiet", action="store_true", help="no progress bars, no table; notes still appear"
    )
    made.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return made


def _target_size(text: str) -> int | float:
    if re.fullmatch(r"\d+|\d{1,3}([_,]\d{3})+", text):
        return int(re.sub("[_,]", "", text))
    if re.fullmatch(r"\d+\.\d*|\.\d+", text):
        return float(text)
    # 1e5 could mean either, and 2,5 neither.
    raise argparse.ArgumentTypeError(
        f"expected a total such as 5000 or 5_000, or a multiple such as 2.0; got {text!r}"
    )


def _by_modality(text: str) -> str | dict[str, str]:
    """One value, or values by modality."""
    if "=" not in text:
        return text
    pairs = [part.split("=") for part in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(
            f"expected a name, or names by modality such as rna=a,atac=b; got {text!r}"
        )
    return dict(pairs)


def _likelihood(text: str) -> str | dict[str, str]:
    given = _by_modality(text)
    for name in given.values() if isinstance(given, dict) else [given]:
        if name not in _LIKELIHOODS:
            raise argparse.ArgumentTypeError(
                f"invalid choice: {name!r} (choose from {', '.join(_LIKELIHOODS)})"
            )
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = parser().parse_args(arguments)
    try:
        return _run(given)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "interrupted; no output was written")


def _run(given: argparse.Namespace) -> int:
    # What can be refused is refused before torch is imported and anything is read.
    if refusal := _refuse(given):
        return _fail(*refusal)
    from cfgen_augment import checkpoint, plot
    from cfgen_augment.model import CFGen
    from cfgen_augment.processes import launched
    from cfgen_augment.training import resolve_device

    try:
        together = launched(given.distributed, given.device)
        device = together.own_device(given.device)
        resolve_device(device)
        if given.save_model is not None:
            checkpoint.check_destination(given.save_model, overwrite=given.force)
        if given.report is not None:
            plot.check_matplotlib()
    except FileExistsError as error:
        return _fail(OUTPUT_EXISTS, str(error))
    except (ValueError, OSError, ImportError) as error:
        return _fail(BAD_INPUT, str(error))
    except RuntimeError as error:  # the processes did not find each other
        return _fail(FAILED, str(error))
    # Each process says what it fails of, as another may have ended before it could; all else is
    # for the first one to say.
    given.quiet = given.quiet or not together.is_first
    given.report = given.report if together.is_first else None
    if given.model is not None:
        try:
            CFGen.load(given.model, device=device)
        except (OSError, ValueError) as error:
            return _fail(UNREADABLE, str(error))
    return _augment(given)


def _refuse(given: argparse.Namespace) -> tuple[int, str] | None:
    """Exit code and message if the arguments cannot lead to an output."""
    from cfgen_augment import files, multimodal

    output = given.output
    try:
        files.check_output(output, overwrite=given.force)
        files.check_kinds(given.input, output)
        if given.report is not None:
            files.check_report(given.report, overwrite=given.force)
        if given.save_model is not None:
            files.check_apart(given.save_model, output)
    except ValueError as error:
        return BAD_INPUT, str(error)
    except FileExistsError as error:
        return OUTPUT_EXISTS, str(error)
    if given.report is not None and given.report.resolve() in {
        place.resolve() for place in (given.input, output, given.save_model) if place is not None
    }:
        return BAD_INPUT, f"--report: expected a place of its own; got {given.report}."
    if given.report is not None and (output.suffix == ".h5mu" or given.modalities is not None):
        return (
            BAD_INPUT,
            "--report: expected an output with one matrix per cell; there are several modalities. "
            "Leave it out, and use cfgen_augment.diagnose on one modality at a time.",
        )
    if given.model is not None:
        default = parser().get_default
        if taken := [name for name in _TRAINING if getattr(given, name) != default(name)]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in taken)
            return (
                BAD_INPUT,
                f"{flags}: expected only without --model, which is trained already. Leave it out.",
            )
    try:
        if output.suffix == ".h5mu":
            multimodal.check_mudata()
        import anndata  # noqa: F401
    except ImportError as error:
        if str(error).startswith("mudata:"):
            return BAD_INPUT, str(error)
        return (
            BAD_INPUT,
            "anndata: expected it to be installed; it is not. Run: "
            "pip install 'cfgen-augment[anndata]'",
        )
    return None


def _augment(given: argparse.Namespace) -> int:
    from cfgen_augment.augmentation import augment_file, summary
    from cfgen_augment.stored import UnreadableError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = _note  # type: ignore[assignment]
        try:
            augmented = augment_file(
                given.input,
                given.output,
                given.label_key,
                target_size=given.target_size,
                donor_key=given.donor_key,
                batch_key=given.batch_key,
                layer=given.layer,
                modalities=given.modalities,
                exponent=given.exponent,
                min_cells=given.min_cells,
                generator=given.model,
                covariates_from=given.covariates_from,
                likelihood=given.likelihood,
                size_factor=given.size_factor,
                max_epochs="auto" if given.max_epochs is None else given.max_epochs,
                guidance=given.guidance,
                overwrite=given.force,
                save_model=given.save_model,
                overwrite_model=given.force,
                device=given.device,
                distributed=given.distributed,
                random_state=given.seed,
                verbose=not given.quiet,
            )
        except (FileNotFoundError, UnreadableError) as error:
            return _fail(UNREADABLE, str(error))
        except (ValueError, TypeError, KeyError) as error:
            # A KeyError's own text would come with quotes around it.
            return _fail(BAD_INPUT, str(error.args[0]) if error.args else repr(error))
        except (FloatingPointError, ImportError, MemoryError, OSError, RuntimeError) as error:
            return _fail(FAILED, str(error) or type(error).__name__)
        except Exception as error:  # a fault of ours: say where, and keep to the exit codes
            traceback.print_exc()
            return _fail(
                FAILED, f"unexpected {type(error).__name__}; please report it with the above"
            )
    if not given.quiet:
        table = summary(augmented, given.label_key)
        print(table.to_string())
        print(
            f"{table['real'].sum():,} real + {table['synthetic'].sum():,} synthetic cells x "
            f"{augmented.n_vars:,} features -> {given.output}"
        )
    return OK if given.report is None else _report(given, augmented.uns["cfgen_augment"]["seed"])


def _report(given: argparse.Namespace, seed: int) -> int:
    """Compare what was written; it stays if that fails."""
    from cfgen_augment import files
    from cfgen_augment.report import write_report

    try:
        with files.opened(given.output) as written:
            table = write_report(
                given.report,
                written,
                label_key=given.label_key,
                random_state=seed,
                overwrite=given.force,
            )
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, f"interrupted; {given.output} was written, {given.report} not")
    except Exception as error:  # the data were fit to be augmented: whatever it is, say which
        if not isinstance(error, (ValueError, OSError, MemoryError)):
            traceback.print_exc()
        message = str(error) or type(error).__name__
        return _fail(FAILED, f"{given.output} was written, but its report not: {message}")
    if not given.quiet:
        n_ok = int((table["verdict"] == "ok").sum())
        print(f"{n_ok} of {len(table)} types ok -> {given.report}")
    return OK


def _note(message: Warning | str, *_: Any) -> None:
    """Show a warning as it comes, without the code that raised it."""
    print(f"note: {message}", file=sys.stderr)


def _fail(code: int, message: str) -> int:
    print(f"cfgen-augment: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
