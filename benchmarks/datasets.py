"""Data sets that go by a name: their files, where they are published, and fetching them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One file that a name can stand for.

    Attributes
    ----------
    file
        Its name, in ``$CFGEN_DATA`` or where it is published.
    url
        Address of the file; None if it is not published as such.
    sha256
        Checksum of what is at `url`; None if its publisher gives none and nobody else is known to
        have taken it, in which case a download says that it could not be verified.
    record
        Zenodo DOI of a record that holds `file`, instead of `url`. Zenodo tells the checksum.
    label_key, donor_key, layer
        As for `load_cells`.
    only
        Column of obs and the value in it of the cells that are used; None for all cells.
    unlabelled
        Values of the labels that mean that there is none.
    """

    file: str
    url: str | None = None
    sha256: str | None = None
    record: str | None = None
    label_key: str | None = None
    donor_key: str | None = None
    layer: str | None = None
    only: tuple[str, str] | None = None
    unlabelled: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSet:
    """What a name stands for: files in order of preference, whose they are, where to read more."""

    sources: tuple[Source, ...]
    citation: str
    page: str


_PAPER = "10.5281/zenodo.15031364"
_PAPER_CITATION = "as processed for CFGen, Palma A et al., ICLR 2025, arXiv:2407.11734"

DATA_SETS: dict[str, DataSet] = {
    "kang": DataSet(
        (
            Source("kang_pbmc_ctrl_8donors.h5ad"),
            # Both conditions and all genes. Several public projects that pin this file agree on
            # its checksum.
            Source(
                "kang_2018.h5ad",
                url="https://exampledata.scverse.org/pertpy/kang_2018.h5ad",
                sha256="e6a5adac64dcdeb36eaba27db49b63e0c64bb0ed4a64c6705971506b41c39830",
                donor_key="replicate",
                only=("label", "ctrl"),
            ),
        ),
        "Kang HM et al., Nat Biotechnol 36:89-94 (2018), doi:10.1038/nbt.4042; unstimulated cells",
        "https://exampledata.scverse.org/pertpy/kang_2018.h5ad (made from GEO GSE96583)",
    ),
    "onek1k": DataSet(
        (Source("onek1k_subset_40donors.h5ad"),),
        "Yazar S et al., Science 376:eabf3041 (2022), doi:10.1126/science.abf3041; 40 donors and "
        "1,000 genes of it, as packaged with scDesignPop",
        "https://github.com/chrisycd/scDesignPop, data/example_sce.rda, which has to be converted",
    ),
    "pbmc3k": DataSet(
        (Source("pbmc3k.h5ad", unlabelled=("unlabelled",)),),
        "10x Genomics, 3k PBMCs from a Healthy Donor (2016), CC BY 4.0; labels as in SeuratData",
        "https://github.com/satijalab/seurat-data, which has to be converted",
    ),
    "dentate-gyrus": DataSet(
        (Source("dentategyrus_train.h5ad", record=_PAPER, label_key="clusters", layer="X_counts"),),
        "La Manno G et al., Nature 560:494-498 (2018), doi:10.1038/s41586-018-0414-6; "
        f"{_PAPER_CITATION}",
        "https://zenodo.org/records/15031364",
    ),
    "tabula-muris": DataSet(
        (Source("tabula_muris_train.h5ad", record=_PAPER, label_key="tissue", layer="X_counts"),),
        "Tabula Muris Consortium, Nature 562:367-372 (2018), doi:10.1038/s41586-018-0590-4; "
        f"{_PAPER_CITATION}, its labels tissues",
        "https://zenodo.org/records/15031364",
    ),
    "hlca": DataSet(
        (Source("hlca_train.h5ad", record=_PAPER, donor_key="donor_id", layer="X_counts"),),
        f"Sikkema L et al., Nat Med 29:1563-1577 (2023), {_PAPER_CITATION}; 429,918 cells and "
        "2,000 genes, which its authors chose on all of their cells",
        "https://zenodo.org/records/15031364",
    ),
    "pbmc-covid": DataSet(
        (Source("pbmc_covid_train.h5ad", record=_PAPER, donor_key="donor_id", layer="X_counts"),),
        f"Yoshida M et al., Nature 602:321-327 (2022), {_PAPER_CITATION}; 2,000 genes, which its "
        "authors chose on all of their cells",
        "https://zenodo.org/records/15031364",
    ),
    "hlca-core": DataSet(
        (
            Source(
                "4cb45d80-499a-48ae-a056-c71ac3552c94.h5ad",
                url="https://datasets.cellxgene.cziscience.com/"
                "4cb45d80-499a-48ae-a056-c71ac3552c94.h5ad",
                donor_key="donor_id",
                layer="raw",
            ),
        ),
        "Sikkema L et al., Nat Med 29:1563-1577 (2023), doi:10.1038/s41591-023-02327-2; core, "
        "584,944 cells, 5.6 GB: needs tens of GB of memory",
        "https://cellxgene.cziscience.com/collections/6f6d381a-7701-4781-935c-db10d30de293",
    ),
}


def locate(name: str) -> tuple[Source, Path]:
    """The file that a name or path stands for, downloaded if it has to be."""
    if name.endswith(".h5ad") or Path(name).is_file() or len(Path(name).parts) > 1:
        return Source(name), Path(name)
    known = DATA_SETS.get(name)
    sources: Sequence[Source] = known.sources if known else ()
    folder = os.environ.get("CFGEN_DATA")
    for source in (*sources, Source(f"{name}.h5ad")) if folder else ():
        path = Path(folder or "", source.file)
        if path.is_file():
            return source, path
    files = " or ".join(dict.fromkeys([*(s.file for s in sources), f"{name}.h5ad"]))
    looked = f"looked for {files} in $CFGEN_DATA ({folder or 'which is not set'})"
    if known is None:
        raise FileNotFoundError(
            f"{name}: expected a path to an h5ad file or one of the names demo, simulated, "
            f"{', '.join(DATA_SETS)}; {looked}. Pass the path of the file."
        )
    remedy = (
        f"Get it from {known.page}, and put it into the directory that $CFGEN_DATA names, or pass "
        f"its path. Data: {known.citation}."
    )
    published = next((s for s in sources if s.url or s.record), None)
    if published is None:
        raise FileNotFoundError(
            f"{name}: {looked} and found none; it is not published as a file that could be "
            f"downloaded. {remedy}"
        )
    try:
        return published, _download(published)
    except OSError as error:
        raise FileNotFoundError(
            f"{name}: {looked} and found none, and could not download {published.file} from "
            f"{published.url or published.record} ({error}). {remedy}"
        ) from error
    except ValueError as error:  # what pooch raises for a wrong checksum
        raise ValueError(
            f"{name}: {looked} and found none, and the download from "
            f"{published.url or published.record} is not what was expected: {error} {remedy}"
        ) from error


def _download(source: Source) -> Path:
    """Fetch a published file into pooch's cache, or find it there."""
    import pooch

    cache = Path(pooch.os_cache("cfgen-augment"))
    progress = sys.stderr.isatty()
    if source.record is not None:
        record = pooch.create(path=cache, base_url=f"doi:{source.record}/", registry=None)
        if (cache / source.file).is_file():  # verified when it was downloaded
            return cache / source.file
        record.load_registry_from_doi()
        if source.file not in record.registry:
            raise ValueError(
                f"expected {source.file} in the record; it holds {', '.join(record.registry)}."
            )
        return Path(record.fetch(source.file, progressbar=progress))
    new = not (cache / source.file).is_file()
    path = Path(
        pooch.retrieve(
            source.url,
            None if source.sha256 is None else f"sha256:{source.sha256}",
            fname=source.file,
            path=cache,
            progressbar=progress,
        )
    )
    if new and source.sha256 is None:
        logger.warning(
            "%s: its publisher gives no checksum, so the download could not be verified. Its "
            "sha256 is %s.",
            source.file,
            pooch.file_hash(str(path)),
        )
    return path


def describe(name: str) -> dict[str, str]:
    """Name of the data as it can be shown to others, and whose they are."""
    if name == "demo":
        citation = "Zheng GXY et al., Nat Commun 8:14049 (2017), 700 PBMCs packaged with scanpy"
    elif name == "simulated":
        citation = "drawn by benchmarks.simulated"
    else:
        file = Path(name).name
        known = DATA_SETS.get(name) or next(
            (d for d in DATA_SETS.values() if any(s.file == file for s in d.sources)), None
        )
        citation = known.citation if known else "a file of the user's own"
    return {"name": Path(name).name, "citation": citation}
