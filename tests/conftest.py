"""What all tests share. One thread: tiny models only lose time by sharing their work out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from hf_longctx import cli
from hf_longctx.evals import assets, clip

from . import operators  # noqa: F401  before what imports transformers
from .evals import tiny_folder

torch.set_num_threads(1)
# How long a draw takes is the machine's.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.save(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def tiny(folder: Path) -> tuple[Any, Any]:
    return assets.load(folder, "float32", "cpu")


def may_fetch(request: pytest.FixtureRequest) -> bool:
    """Whether the tests were started with `-m network`."""
    return "network" in request.config.option.markexpr.replace("not network", "")


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    if not assets.is_cached() and not may_fetch(request):
        pytest.skip("SmolLM2 is not in the cache; hf-longctx demo or pytest -m network fetches it")
    return assets.load(None, "float32", "cpu")


@pytest.fixture(scope="session")
def bunny(request: pytest.FixtureRequest) -> Path:
    if not clip.is_cached() and not may_fetch(request):
        pytest.skip("the clip is not in the cache; hf-longctx eval stream or pytest -m network fetches it")
    return clip.fetch()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-longctx", *args])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    return run
