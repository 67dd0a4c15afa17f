"""What comes out of `pip wheel .`, and what to install it changes; the compiler is one that only touches files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
_COMPILER = '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho built > "$2"\n'


def pip(*args: object, **more: str) -> str:
    env = {**os.environ, "PIP_NO_INDEX": "1", "NVCC": "no-nvcc", **more}
    done = subprocess.run([*PIP, *map(str, args)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a source package has, and no more."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    left_out = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(ROOT / "hf_longctx", folder / "hf_longctx", ignore=left_out)
    return folder


def wheel(tree: Path, out: Path, **env: str) -> Path:
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, tree, **env)
    [made] = out.iterdir()
    return made


def test_with_a_compiler_there_is_one_wheel_for_every_later_python(tree: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(_COMPILER)
    compiler.chmod(0o755)
    made = wheel(tree, tmp_path / "out", CXX=str(compiler), HF_LONGCTX_BUILD="auto")
    assert made.name.split("-", 2)[2].startswith("cp310-abi3-linux_")
    with zipfile.ZipFile(made) as file:
        assert file.read("hf_longctx/_C.so") == b"built\n"
        about = next(file.read(name).decode() for name in file.namelist() if name.endswith(".dist-info/WHEEL"))
    assert "Root-Is-Purelib: false" in about
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text()


def test_without_one_the_wheel_is_for_every_platform_and_says_why_and_changes_nothing(
    tree: Path, tmp_path: Path
) -> None:
    made = wheel(tree, tmp_path / "out", CXX="no-compiler", HF_LONGCTX_BUILD="auto")
    assert made.name.split("-", 2)[2] == "py3-none-any.whl"
    with zipfile.ZipFile(made) as file:
        names = file.namelist()
        assert "hf_longctx/_C.so" not in names
        assert "no CPU code: there is no no-compiler on the PATH" in file.read("hf_longctx/_C.txt").decode()
        assert "hf_longctx/py.typed" in names
        assert not any(".data/" in name for name in names)
    # without an index, whatever would have to be another version is an error
    told = json.loads(pip("install", "--dry-run", "-q", "--report", "-", "--force-reinstall", "--no-deps", made))
    assert [each["metadata"]["name"] for each in told["install"]] == ["hf_longctx"]
    wanted = told["install"][0]["metadata"]["requires_dist"]
    satisfied = pip("install", "--dry-run", *(each for each in wanted if "extra ==" not in each))
    assert "Would install" not in satisfied
    assert satisfied.count("Requirement already satisfied") >= len([each for each in wanted if "extra ==" not in each])
