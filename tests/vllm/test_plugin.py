"""What vLLM sees of the plugin before it runs anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import hf_longctx
from hf_longctx.vllm import register
from hf_longctx.vllm.order import find_order


def test_the_entry_point_is_declared() -> None:
    declared = (Path(hf_longctx.__file__).parents[1] / "pyproject.toml").read_text()
    group = declared.split('[project.entry-points."vllm.general_plugins"]')[1].split("[")[0]
    module, _, name = group.split('"')[1].partition(":")
    assert getattr(sys.modules[module], name) is register


def test_the_entry_point_loads_neither_vllm_nor_torch() -> None:
    code = "import sys, hf_longctx.vllm; assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(hf_longctx.__file__).parents[1])


@pytest.mark.parametrize("version", ["0.31.2", "0.320.0", "1.0.0"])
def test_beside_an_untested_version_it_steps_aside_with_one_line(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = ModuleType("vllm")
    fake.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)  # has no other part: to import one would raise
    monkeypatch.setenv("HF_LONGCTX_VLLM_QUEST", "no knobs")
    register()
    assert [record.getMessage() for record in caplog.records] == [
        f"hf_longctx was tested with vLLM 0.32, not {version}: not used."
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("block", "dim"), [(4, 8), (32, 64), (128, 256)])
def test_any_order_of_keys_is_found(dtype: torch.dtype, block: int, dim: int) -> None:
    torch.manual_seed(6)
    order = torch.randperm(block * dim)
    found = find_order(lambda keys: keys.flatten()[order], block, dim, dtype)
    keys = torch.randn(block, dim, dtype=dtype)
    assert torch.equal(keys.flatten()[order][found], keys)


def test_keys_that_are_rounded_when_stored_are_refused() -> None:
    with pytest.raises(ValueError, match="find_order: expected a cache that keeps keys as they are"):
        find_order(lambda keys: keys.flatten().to(torch.float8_e4m3fn).float(), 16, 16, torch.float32)
