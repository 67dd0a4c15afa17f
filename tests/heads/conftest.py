from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_longctx.evals import assets

from ..evals import tiny_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.save(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def tiny(folder: Path) -> tuple[Any, Any]:
    return assets.load(folder, "float32", "cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    if not assets.is_cached() and "network" not in request.config.option.markexpr.replace("not network", ""):
        pytest.skip("SmolLM2 is not in the cache; hf-longctx demo or pytest -m network fetches it")
    return assets.load(None, "float32", "cpu")
