"""The documentation says what the code does: messages that exist, models as they are, pages for all methods."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import hf_longctx as lc
from hf_longctx.cli import app
from hf_longctx.evals import grammar
from hf_longctx.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(DOCS.rglob("*.md"))]


def commands(path: Path) -> list[str]:
    """Lines of a page's code blocks that call the command."""
    kind, lines = None, []
    for line in re.sub(r"\\\n\s*", " ", path.read_text()).splitlines():
        if line.startswith("```"):
            kind = line[3:] if kind is None else None
        elif kind in ("", "bash", "sh"):
            lines += [part.strip() for part in line.split("&&")]
    return [line for line in lines if re.search(r"(^|\s)(hf-longctx|hf_longctx\.cli)(\s|$)", line)]


def code(path: Path) -> list[str]:
    """Blocks of Python of a page; transcripts aside."""
    found = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    return [block for block in found if not block.startswith(">>>")]


COMMANDS = [(path, line) for path in PAGES for line in commands(path)]


def test_every_message_of_the_catalogue_is_one_of_the_code() -> None:
    said = re.findall(r"^\| `(.+?)` \|", (DOCS / "errors.md").read_text(), re.MULTILINE)
    assert len(said) > 10
    # a literal may be cut over several lines, and its middle may be a value
    code = " ".join(file.read_text() for file in (ROOT / "hf_longctx").rglob("*.py"))
    code = re.sub(r'"\s*f?"', "", re.sub(r"\{[^{}]*\}", "", code))
    missing = [message for message in said if re.sub(r"\s+", " ", message) not in re.sub(r"\s+", " ", code)]
    assert missing == []


def test_every_method_has_a_page() -> None:
    pages = {page.stem for page in (DOCS / "methods").glob("*.md")}
    assert set(METHODS) - {"auto", "dense"} <= pages
    index = (DOCS / "methods" / "index.md").read_text()
    assert all(f"`{name}`" in index for name in METHODS)


@pytest.mark.parametrize("name", ["models_table", "errors_table"])
def test_tables_are_those_of_the_code(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    text = made.PAGE.read_text()
    assert text == made.page(text), f"run python docs/{name}.py"


@pytest.mark.parametrize(("path", "line"), COMMANDS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_every_command_is_one(path: Path, line: str) -> None:
    words = shlex.split(line, comments=True)
    args = words[min(i for i, word in enumerate(words) if word in ("hf-longctx", "hf_longctx")) + 1 :]
    command = get_command(app)
    while hasattr(command, "commands"):
        assert args
        assert args[0] in command.commands
        command, args = command.commands[args[0]], args[1:]
    given = command.make_context("it", list(args)).params  # refuses an option or a value that it does not take
    if given.get("methods") and "ppl" not in words:  # which has more of them
        grammar.methods(given["methods"])


def resolved(node: ast.expr) -> Any:
    """What `lc.` names stand for; None: it is of something else."""
    if isinstance(node, ast.Name):
        return lc if node.id == "lc" else None
    owner = resolved(node.value) if isinstance(node, ast.Attribute) else None
    return None if owner is None else getattr(owner, node.attr)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "number"),
    [(path, i) for path in PAGES for i in range(len(code(path)))],
    ids=lambda x: getattr(x, "name", x),
)
def test_python_on_pages_calls_what_there_is(path: Path, number: int) -> None:
    for node in ast.walk(ast.parse(code(path)[number])):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_longctx"):
            assert [each.name for each in node.names if not hasattr(import_module(node.module), each.name)] == []  # type: ignore[arg-type]
        called = (
            resolved(node.func)
            if isinstance(node, ast.Call)
            else resolved(node)
            if isinstance(node, ast.Attribute)
            else None
        )
        if not isinstance(node, ast.Call) or called is None:
            continue
        given = {each.arg: each.value for each in node.keywords if each.arg}
        inspect.signature(called).bind_partial(*node.args, **given)
        if called is lc.patch and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            own = given.keys() - inspect.signature(lc.patch).parameters.keys()
            known = inspect.signature(METHODS[node.args[1].value]).parameters
            assert own <= known.keys()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_is_named_is_there(path: Path) -> None:
    text = path.read_text()
    linked = [each.partition("#")[0] for each in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in each]
    missing = [each for each in linked if each and not (path.parent / each).exists()]
    named = re.findall(r"(?:python3?|`)\s*((?:benchmarks|notebooks|docs|tests|csrc)/[\w./*-]*\w)", text)
    assert [each for each in {*named} if not any(ROOT.glob(each))] + missing == []


def test_tests_that_are_named_are_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "kernels.md").read_text()))
    there = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) > 15
    assert named <= there


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_short_and_have_their_outputs(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    assert len(cells) <= 12
    ran = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1))
    outputs = [output for cell in ran for output in cell["outputs"]]
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in ran[-1]["outputs"])
    assert not re.search(r"/root/|/home/|/tmp/", json.dumps(cells))
