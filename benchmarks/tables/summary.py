"""Tables of finished parts: mean and spread over seeds, and every type by itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.realism import to_markdown
from benchmarks.tables.cells import ATAC, RNA
from benchmarks.tables.models import REAL, TABLES, Model
from benchmarks.tables.spaces import LEAST, POOLED
from benchmarks.tables.work import collect, read_manifest

#: Columns: measure, and over what; ``type`` is the mean over types, ``pooled`` all types together.
COLUMNS = {
    "F1": ("f1", "pooled"),
    "W2 per type": ("w2", "type"),
    "MMD per type": ("mmd", "type"),
    "W2 pooled": ("w2", "pooled"),
    "MMD pooled": ("mmd", "pooled"),
}
_TITLES = {RNA: "RNA", ATAC: "ATAC"}


def per_seed(rows: pd.DataFrame, types: Mapping[str, int]) -> pd.DataFrame:
    """Every measure of every model and seed.

    Parameters
    ----------
    rows
        Of `benchmarks.tables.work.collect`.
    types
        Held-out cells of every type: those with fewer than `LEAST` are in no mean over types.

    Returns
    -------
    DataFrame
        Indexed by ``model``, ``modality`` and ``seed``; columns as in `COLUMNS`.
    """
    keys = ["model", "modality", "seed"]
    pooled = rows[rows["type"] == POOLED].set_index(keys)
    counted = [name for name, n in types.items() if n >= LEAST]
    by_type = rows[rows["type"].isin(counted)].groupby(keys)[["w2", "mmd"]].mean()
    return pd.DataFrame(
        {
            title: (pooled if over == "pooled" else by_type)[measure].astype(float)
            for title, (measure, over) in COLUMNS.items()
        },
        index=pooled.index,
    )


def table(
    rows: pd.DataFrame, types: Mapping[str, int], models: Mapping[str, Model]
) -> pd.DataFrame:
    """Mean and standard deviation over seeds, a row per model and modality.

    Returns
    -------
    DataFrame
        Indexed by ``model`` and ``modality`` in the order of `models`; columns ``seeds`` and those
        of `COLUMNS`, each followed by its ``SD``, with ``ddof=1``, NaN of one seed.
    """
    return _over_seeds(per_seed(rows, types), models)


def excess(
    rows: pd.DataFrame, types: Mapping[str, int], models: Mapping[str, Model]
) -> pd.DataFrame:
    """As `table`, distances above those of the real cells of the same split.

    Splits differ in how far apart any two sets of cells are; that is in the spread of `table`, and
    not in how models compare.
    """
    found = per_seed(rows, types)
    floor = found.xs(REAL, level="model")
    others = found.drop(index=REAL, level="model")
    return _over_seeds(others - floor.reindex(others.index.droplevel("model")).to_numpy(), models)


def _over_seeds(found_by_seed: pd.DataFrame, models: Mapping[str, Model]) -> pd.DataFrame:
    """Means and standard deviations, see `table`."""
    grouped = found_by_seed.groupby(level=["model", "modality"])
    found = pd.DataFrame({"seeds": grouped.size()})
    for title in COLUMNS:
        found[title] = grouped[title].mean()
        found[f"{title} SD"] = grouped[title].std(ddof=1)
    order = [
        (name, modality)
        for name in models
        for modality in (RNA, ATAC)
        if (name, modality) in found.index
    ]
    return found.reindex(pd.MultiIndex.from_tuples(order, names=["model", "modality"]))


def shown(frame: pd.DataFrame, models: Mapping[str, Model], *, above: str = "") -> str:
    """The table as markdown: one for each modality, and one of cells made without types.

    `above` says what values are above, if they are differences; F1 is then left out.
    """
    parts = []
    for modality in (RNA, ATAC):
        for typed in (True, False):
            names = [n for n, m in frame.index if m == modality and models[n].typed == typed]
            if not names:
                continue
            columns = [c for c in COLUMNS if typed or c.endswith("pooled")]
            columns = [c for c in columns if not (above and c == "F1")]
            if not typed and REAL in frame.index.get_level_values("model"):
                names.insert(0, REAL)  # the floor of columns that do not look at types
            lines = {}
            for name in names:
                row = frame.loc[(name, modality)]
                lines[models[name].title] = {c: _spread(row, c) for c in columns} | {
                    "seeds": str(int(row["seeds"]))
                }
            titles = [_TITLES[modality]] + ([above] if above else [])
            titles += [] if typed else ["types not given"]
            one = pd.DataFrame.from_dict(lines, orient="index").rename_axis(index=", ".join(titles))
            parts.append(to_markdown(one))
    return "\n\n".join(parts)


def _spread(row: pd.Series, column: str) -> str:
    """``10.21 ± 0.13``; digits enough for what is near zero."""
    mean, spread = row[column], row[f"{column} SD"]
    if pd.isna(mean):
        return ""
    digits = 2 if column.startswith("W2") else 3
    text = f"{mean:.{digits}f}"
    return text if pd.isna(spread) else f"{text} ± {spread:.{digits}f}"


def write_tables(out: Path) -> str:
    """Write ``table.csv``, ``types.csv`` and ``table.md`` from what is finished.

    Returns
    -------
    str
        What ``table.md`` holds.

    Raises
    ------
    FileNotFoundError
        If nothing is finished.
    """
    manifest = read_manifest(out)
    models = TABLES[manifest["design"]["table"]]
    rows = pd.DataFrame(collect(out))
    if rows.empty:
        raise FileNotFoundError(f"{out}: expected finished parts; there are none yet.")
    types = held_out_sizes(manifest)
    frame = table(rows, types, models)
    rows[rows["type"] != POOLED].to_csv(out / "types.csv", index=False)
    frame.to_csv(out / "table.csv")
    text = f"{heading(manifest, frame)}\n\n{shown(frame, models)}\n"
    if REAL in frame.index.get_level_values("model") and len(set(rows["model"])) > 1:
        above = shown(excess(rows, types, models), models, above="above real cells")
        text += f"\nThe same distances above those of real cells, split by split:\n\n{above}\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    return text


def held_out_sizes(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Held-out cells of every type, the same for all seeds."""
    share = manifest["design"]["held_out"]
    return {name: round(share * n) for name, n in manifest["about"]["types"].items()}


def heading(manifest: Mapping[str, Any], frame: pd.DataFrame) -> str:
    """What the numbers are of, and the command."""
    about, sizes = manifest["about"], held_out_sizes(manifest)
    features = " and ".join(
        f"{n:,} {'genes' if name == RNA else 'peaks'}" for name, n in about["n_features"].items()
    )
    few = [f"{name} ({n})" for name, n in sizes.items() if n < LEAST]
    left_out = f" Too few held out for means over types: {', '.join(few)}." if few else ""
    commands = "\n\n".join(f"`{command}`" for command in manifest["command"])
    return (
        f"### Table {manifest['design']['table']}: {manifest['design']['data']}\n\n"
        f"{commands}\n\n{about['n_cells']:,} cells, {features}, {len(sizes)} types; "
        f"{sum(sizes.values()):,} cells held out by each of {int(frame['seeds'].max())} seeds; "
        f"mean ± SD over seeds.{left_out}"
    )
