"""The package's own module: light to import, complete when asked, and functions stay functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_longctx as lc

ROOT = Path(lc.__file__).parent


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["demo", "--help"], ["eval", "ppl", "--help"]])
def test_the_command_answers_without_the_heavy_libraries(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["hf-longctx", *{arguments}]
from hf_longctx import cli
try:
    cli.main()
except SystemExit as ended:
    print("ended", ended.code, {{"torch", "transformers", "numpy"}} & set(sys.modules))
"""
    assert run(code).splitlines()[-1] == "ended 0 set()"


@pytest.mark.parametrize(
    "code",
    [
        "import hf_longctx as lc; patch, report = lc.patch, lc.report",
        "import hf_longctx.report, hf_longctx.patch as patch; report = hf_longctx.report",
        "from hf_longctx.patch import state_of; from hf_longctx import patch, report",
        "import importlib, hf_longctx.demo; importlib.reload(hf_longctx); from hf_longctx import patch, report",
    ],
)
def test_functions_stay_functions_beside_modules_of_their_name(code: str) -> None:
    """Python sets a package's attribute when it first loads a module, in whatever order modules are loaded."""
    assert run(f"{code}\nprint(type(patch).__name__, patch.__name__, type(report).__name__, report.__name__)") == (
        "function patch function report\n"
    )


def test_every_name_is_there_before_and_after_it_is_loaded() -> None:
    code = """
import sys
import hf_longctx as lc
names = set(dir(lc))
assert "torch" not in sys.modules
assert set(lc.__all__) <= names
from hf_longctx import *
assert all(globals()[name] is getattr(lc, name) for name in lc.__all__)
assert names <= set(dir(lc))
"""
    assert run(code) == ""


def test_a_plan_is_read_back_by_the_first_name_that_is_used() -> None:
    """All primitives are known by then, though `Plan` itself does not know of them."""
    plan = lc.Plan("x", (lc.LayerPlan((lc.HeadGroup((0,), lc.HeadPolicy(lc.SinkWindow(1, 2), lc.InCache())),)),))
    assert run(f"from hf_longctx import Plan\nprint(Plan.from_json({plan.to_json()!r}))") == f"{plan}\n"


def test_an_unknown_name_is_an_error_of_its_own() -> None:
    with pytest.raises(AttributeError, match="module 'hf_longctx' has no attribute 'ptach'"):
        _ = lc.ptach
    with pytest.raises(ImportError, match="cannot import name 'ptach'"):
        from hf_longctx import ptach  # noqa: F401


def test_names_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lc, "patch", len)
    assert lc.patch is len


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    seen = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
        if alias.asname
    }
    assert seen == {**lc._HOME, **dict.fromkeys(lc._ROOMS)}
