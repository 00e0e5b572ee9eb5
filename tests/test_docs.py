"""The documentation runs: its Python, its commands, its links, and what it says of the package."""

from __future__ import annotations

import ast
import builtins
import doctest
import re
import shlex
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import simulate

from cfgen_augment import CFGen, cli, model

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"(?:^<!-- raises (?P<error>\w+): (?P<match>.+?) -->\n)?"
    r"^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass
class Block:
    language: str
    code: str
    error: str | None
    match: str | None


def blocks(page: Path, *languages: str) -> list[Block]:
    found = (Block(**m.groupdict()) for m in FENCE.finditer(page.read_text()))
    return [block for block in found if block.language in languages]


@pytest.fixture
def run_page(tmp_path, monkeypatch):
    """Execute a page from top to bottom on simulated cells; models trained by each block."""
    cells = simulate({"B": 80, "NK": 30, "T": 58})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "_AUTO_EPOCHS", ((1, 1, 1, 1), (1, 1, 1, 1)))
    fit, trained = CFGen.fit, []
    monkeypatch.setattr(CFGen, "fit", lambda *a, **k: (trained.append(a), fit(*a, **k))[1])

    def run(page: Path) -> dict[str, int]:
        # A module that can be looked up, because joblib hashes functions by where they live.
        module = types.ModuleType("documentation_page")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        names = module.__dict__
        names.update(X=cells.X, y=cells.labels, donors=cells.donors)
        parts = blocks(page, "python", "pycon")
        if any("adata" in part.code for part in parts):
            names["adata"] = pytest.importorskip("anndata").AnnData(
                cells.X.copy(), obs={"cell_type": cells.labels, "donor": cells.donors}
            )
            names["adata"].obs_names = [f"cell{i}" for i in range(cells.X.shape[0])]
        counts = {}
        for part in parts:
            before = len(trained)
            if part.language == "pycon":
                test = doctest.DocTestParser().get_doctest(part.code, names, page.name, None, 0)
                report: list[str] = []
                failed, _ = doctest.DocTestRunner().run(test, out=report.append, clear_globs=False)
                assert not failed, "".join(report)
                names.update(test.globs)
            elif part.error:
                with pytest.raises(getattr(builtins, part.error), match=part.match):
                    exec(compile(part.code, str(page), "exec"), names)
            else:
                exec(compile(part.code, str(page), "exec"), names)
            counts[part.code] = len(trained) - before
        return counts

    return run


# Models that blocks train, by a piece of the block: what the pages say about cost and leakage.
TRAINED = {
    "README.md": {"cross_val_score(model": 5, "cross_val_predict(steps": 3},
    "pitfalls.md": {
        "honest = cross_val_score(make_pipeline(sampler": 5,
        "leaks = cross_val_score(make_pipeline(reused": 1,
        "honest = cross_val_score(make_pipeline(template": 5,
        "slow = GridSearchCV": 3 * 3 + 1,
        "fast = GridSearchCV": 3 + 1,
        "make_pipeline(normalise, sampler, classifier)": 0,
        "CFGenSampler(target_size=2).fit": 0,
    },
    "anndata-and-cli.md": {'generator="model"': 0, 'save_model="model"': 1},
}


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python", "pycon")], ids=lambda p: p.name
)
def test_examples_run_and_train_as_often_as_stated(run_page, page):
    trained = run_page(page)
    for piece, expected in TRAINED.get(page.name, {}).items():
        assert [n for code, n in trained.items() if piece in code] == [expected], piece


def test_readme_leads_with_a_short_example_and_names_the_two_commands():
    first = blocks(ROOT / "README.md", "python")[0].code
    assert "CFGenSampler" in first
    assert "make_pipeline" in first
    assert len(first.splitlines()) <= 12
    commands = [
        line.split("#")[0].strip()
        for block in blocks(ROOT / "README.md", "sh")
        for line in block.code.splitlines()
    ]
    assert {"make demo", "make test"} <= set(commands)


def shell_lines() -> list[str]:
    text = [block.code for page in PAGES for block in blocks(page, "sh")]
    lines = "\n".join(text).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("cfgen-augment ")]


@pytest.mark.parametrize("line", shell_lines())
def test_commands_parse(line):
    assert cli.parser().parse_args(shlex.split(line)[1:]).label_key == "cell_type"


def test_command_line_page_lists_every_option_and_exit_code():
    page = (ROOT / "docs" / "anndata-and-cli.md").read_text()
    options = {o for action in cli.parser()._actions for o in action.option_strings}
    options -= {"-h", "--help", "--version"}
    assert options == set(re.findall(r"`(--[a-z-]+)[ `]", page.split("| option |")[1]))
    codes = {int(n) for n in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    constants = (
        cli.OK,
        cli.BAD_INPUT,
        cli.OUTPUT_EXISTS,
        cli.UNREADABLE,
        cli.FAILED,
        cli.INTERRUPTED,
    )
    assert codes == set(constants)


def imported(module: Path) -> set[str]:
    """Modules of the package that a module imports."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "cfgen_augment":
            names |= {alias.name for alias in node.names} - {"__version__"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cfgen_augment."):
            names.add(node.module.split(".")[1])
    return names


def test_house_table_states_what_modules_import():
    table = (ROOT / "docs" / "how-it-works.md").read_text().split("## The house")[1]
    rows = [[cell.strip() for cell in r.split("|")] for r in table.splitlines() if r[:3] == "| `"]
    stated = {row[1].strip("`"): set(re.findall(r"`(\w+)`", row[3])) for row in rows}
    modules = [m for m in (ROOT / "cfgen_augment").glob("*.py") if m.stem != "__init__"]
    assert stated == {module.stem: imported(module) for module in modules}
    for i, name in enumerate(stated):
        assert stated[name] <= set(list(stated)[:i]), f"{name} imports what is below it"


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "api").glob("*.md"))],
    ids=lambda p: p.name,
)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            assert target.startswith(("https://arxiv.org/", "https://doi.org/"))
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
