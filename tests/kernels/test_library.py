"""The compiled library: found, checked, and said why not; built and installed as asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hf_longctx.kernels.compiled import library
from hf_longctx.kernels.dispatch import use_backend

from .built import need

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A path at which the library is looked for."""
    monkeypatch.setenv("HF_LONGCTX_LIB", str(tmp_path / "_C.so"))
    library._load.cache_clear()
    yield tmp_path / "_C.so"
    library._load.cache_clear()


def test_a_library_that_is_not_there(elsewhere: Path) -> None:
    assert "there is no _C.so" in str(library.reason(CPU))
    elsewhere.with_suffix(".txt").write_text("no CPU code: there is no g++ on the PATH\n")
    library._load.cache_clear()
    assert library.reason(CPU) == "no CPU code: there is no g++ on the PATH"
    assert library.about() == ""


def test_a_file_that_is_no_library(elsewhere: Path) -> None:
    elsewhere.write_bytes(b"\x7fELF and nothing else")
    assert "cannot be loaded" in str(library.reason(CPU))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("int other;", "cannot be loaded"),
        ('extern "C" int hfl_abi() { return 999; }', "has interface 999, this package 8"),
    ],
)
def test_a_library_of_something_else_or_of_another_version(elsewhere: Path, code: str, said: str) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ on the PATH")
    command = [compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(elsewhere)]
    subprocess.run(command, input=code, text=True, check=True)
    assert said in str(library.reason(CPU))


def test_without_a_library_everything_runs(elsewhere: Path) -> None:
    from hf_longctx.kernels import dispatch, ops

    q = torch.randn(1, 2, 1, 64)
    out = ops.attend_pages(q, q, q, ops.Logits(0.125), ops.Visibility(), None)
    assert dispatch.last_used()["attend_pages"] == "torch"
    torch.testing.assert_close(out, q)
    with use_backend("compiled"), pytest.raises(dispatch.UnsupportedError, match=r"there is no _C\.so"):
        ops.attend_pages(q, q, q, ops.Logits(0.125), ops.Visibility(), None)
    assert {row.reason for row in dispatch.table() if row.backend == "compiled" and row.op == "attend_pages"} == {
        "there is no _C.so: install the package"
    }


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("CUDA sm_80, sm_90a", (8, 0), True),
        ("CUDA sm_80, sm_90a", (8, 9), True),
        ("CUDA sm_86", (8, 0), False),
        ("CUDA sm_80, sm_90a", (9, 0), True),
        ("CUDA sm_80, sm_90a", (10, 0), False),
        ("CUDA sm_80, compute_80", (12, 1), True),
        ("CUDA compute_90a", (10, 0), False),
        ("CPU only", (9, 0), False),
    ],
)
def test_which_devices_run_which_code(built: str, capability: tuple[int, int], runs: bool) -> None:
    assert library.runs_on(built, *capability) is runs


def test_a_device_for_which_there_is_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    need("cpu")
    library._reason_on.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(library, "about", lambda: "CUDA sm_80, sm_90a")
    said = str(library.reason(torch.device("cuda", 7)))
    library._reason_on.cache_clear()
    assert said.startswith("has no code for sm_75: its library is for CUDA sm_80, sm_90a")


def _install(target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(ROOT)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_an_isolated_install_builds_the_library(tmp_path: Path) -> None:
    done = _install(tmp_path, HF_LONGCTX_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    code = "from hf_longctx.kernels.compiled import library; import torch; print(library.path(), library.about())"
    code += "; assert library.reason(torch.device('cpu')) is None"
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said.strip() == f"{tmp_path / 'hf_longctx' / '_C.so'} CPU only"


@pytest.mark.slow
def test_without_a_compiler_it_installs_and_says_why(tmp_path: Path) -> None:
    nothing = {"CXX": "no-such-compiler", "NVCC": "no-such-compiler"}
    done = _install(tmp_path, **nothing)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "hf_longctx" / "_C.so").exists()
    assert "there is no no-such-compiler on the PATH" in (tmp_path / "hf_longctx" / "_C.txt").read_text()
    asked = _install(tmp_path / "other", HF_LONGCTX_BUILD="cpu", **nothing)
    assert asked.returncode != 0
    assert "HF_LONGCTX_BUILD=cpu: there is no no-such-compiler" in asked.stdout + asked.stderr
