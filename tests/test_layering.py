"""Imports run one way: patch, attention, methods, cache, kernels, plan; and importing the package changes nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_longctx

ROOT = Path(hf_longctx.__file__).parent
ROOMS = {
    "plan": {"errors", "plan"},
    "kernels": {"errors", "kernels"},
    "cache": {"errors", "plan", "kernels", "cache"},
    "select": {"errors", "plan", "kernels", "select"},
    "machine": set(),
    "shards": {"errors"},
    "models": {"errors", "machine", "shards"},
    "heads/__init__": {"heads"},
    "heads/pattern": {"heads"},
    "heads/pattern_io": {"heads"},
    "heads/fingerprint": {"heads"},
    "files": set(),
    "tune/thresholds": {"files"},
    "tune/crossover": {"files", "machine"},
    "limits": {"cache", "plan"},
    "memory": {"cache", "models", "plan"},
    "forecast": {"cache", "memory", "models", "plan", "prompt"},
    "methods": {
        *("errors", "plan", "cache", "select", "models", "heads", "tune", "methods"),
        *("forecast", "memory"),
    },
    "gradient": {"errors"},
    "turning": {"cache", "context", "errors", "kernels"},
    "sight": {"plan", "cache", "kernels", "context", "limits"},
    "route": {"plan", "cache", "context", "limits", "sight"},
    "group": {"plan", "cache", "kernels", "select", "context", "gradient", "route", "sight", "turning"},
    "layer": {"plan", "cache", "kernels", "select", "context", "group", "route"},
    "alike": {"plan", "cache", "kernels", "context", "route", "sight"},
    "attention": {"errors", "plan", "cache", "kernels", "models", "context", "alike", "graphed", "group", "layer"},
    "graphed": {"attention", "context", "kernels"},  # the same function, inside a compiler's graph
    "recording": {"cache", "limits", "plan"},
    "obstacles": {"cache", "models", "plan"},
    "graph": {"cache", "context", "models", "obstacles", "plan", "recording"},
    "ahead": {"cache", "graph", "memory", "obstacles"},
    "shortcut": {"cache", "context"},
    "projections": {"kernels", "shortcut"},
    "shortcuts": {"context", "kernels", "projections", "shortcut", "turning"},
    "integers": {"kernels", "shortcut", "shortcuts", "weights"},
    "places": {"attention", "cache", "context", "errors", "models", "plan"},
    "sinks": {"context", "errors", "models"},
    "testing": {"plan", "testing"},
    "weights/registry": set(),
    "weights/qoq": {"errors", "kernels", "shards", "weights"},
    "weights/bitdelta": {"errors", "evals", "kernels", "options", "shards", "weights"},
    "deltas": {"models", "weights"},
    "streaming/events": set(),
    "streaming/chat": {"errors", "models"},
    "streaming/layout": {"cache"},
    "streaming/rounds": {"streaming"},
    "streaming/sampling": set(),
    "streaming/settings": set(),
    "streaming/stats": set(),
    "streaming/windows": set(),
    "streaming/tower": {"graph", "obstacles", "recording", "streaming"},
    "streaming/reading": {"cache", "models", "streaming"},
    "streaming/engine": {"cache", "models", "streaming", "turning"},
    "streaming/session": {"cache", "methods", "models", "patch", "session", "streaming"},
    "streaming/saved": {"session", "streaming"},
    "streaming/frames": set(),
    "streaming/channel": set(),
    "streaming/pictures": set(),
    "streaming/video": {"streaming"},
    "streaming/opening": {"streaming"},
    "streaming/source": {"streaming"},
    "streaming/captions": {"streaming"},
    "streaming/subtitles": set(),
    "streaming/watch": {"streaming"},
    "configs": {"evals", "weights"},
    "bench": {
        *("configs", "errors", "evals", "kernels", "machine", "models", "options", "plan", "prompt", "bench"),
        *("LongContextCache", "patched", "report"),
    },
    "vllm": {"errors", "heads", "kernels", "methods", "plan", "select", "vllm", "weights"},
    "training": {"errors", "files", "models", "streaming", "training"},
}
"""What each room may import from the package; whatever is not listed stands above them all."""


def imported(path: Path) -> set[str]:
    """Rooms of the package that a file imports, wherever in the file it does."""
    here = ("hf_longctx", *path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.level or (node.module or "").startswith("hf_longctx")):
            continue
        base = here[: len(here) - node.level + 1] if node.level else ()
        target = (*base, *(node.module or "").split(".")) if node.module else base
        found |= {target[1]} if len(target) > 1 else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_below(room: str) -> None:
    files = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) <= ROOMS[room], path.name


def foreign(path: Path) -> set[str]:
    """Other packages that a file imports, the standard library aside."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("room", "packages"),
    [("plan", set()), ("kernels", {"torch", "triton"}), ("cache", {"torch", "transformers"}), ("methods", set())],
)
def test_other_packages_stay_where_they_belong(room: str, packages: set[str]) -> None:
    for path in sorted((ROOT / room).rglob("*.py")) or [ROOT / room]:
        host = path.name in ("cache.py", "layer.py")  # where the contract with transformers is
        assert foreign(path) <= packages - (set() if host else {"transformers"}), path.name


def test_only_the_outermost_rooms_know_of_patch() -> None:
    knowing = {path.stem for path in ROOT.rglob("*.py") if "patch" in imported(path)}
    assert knowing == {"__init__", "report", "session", "tap", "trace"}


def test_importing_the_package_registers_nothing() -> None:
    code = (
        "import hf_longctx, transformers, torch;"
        "assert 'hf_longctx' not in transformers.AttentionInterface._global_mapping;"
        "assert 'hf_longctx' not in transformers.AttentionMaskInterface._global_mapping;"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_no_file_is_longer_than_300_lines() -> None:
    assert {path.name for path in ROOT.rglob("*.py") if len(path.read_text().splitlines()) > 300} == set()
