"""A layer's decode step as one operation gives what its groups of heads give one by one; here with the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hf_longctx as lc
from hf_longctx import layer
from hf_longctx.kernels import dispatch

from ..kernels.built import need
from ..methods.cases import LIMITS, LOSSY, Row, named
from .cases import BY_NAME
from .test_generate import batch, generate
from .test_graph import LSERVE, QUEST, STORED, assert_same, told
from .tiny import Case

CASES = [BY_NAME[name] for name in ("llama", "gemma2", "gpt_oss", "mpt")]


def counted(row: Row, case: Case, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, int]:
    """What is generated, and in how many layers' steps by one operation."""
    calls = []
    call = dispatch.call

    def watch(op: str, *args: Any) -> Any:
        calls.append(op)
        return call(op, *args)

    monkeypatch.setattr(dispatch, "call", watch)
    out = generate(lc.patch(case.make(), row.method(case)), batch(case), output_logits=True, max_new_tokens=30)
    monkeypatch.setattr(dispatch, "call", call)
    return out, calls.count("attend_layer")


@pytest.mark.parametrize(
    ("row", "case"),
    [(row, c) for row in (LIMITS[0], *LOSSY, QUEST, LSERVE, *STORED) for c in CASES if row.takes(c)],
    ids=named,
)
def test_at_once_as_one_by_one(row: Row, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    need("cpu")
    one_by_one, none = counted(row, case, monkeypatch)
    monkeypatch.setattr(layer, "DEVICES", {"cpu"})
    at_once, some = counted(row, case, monkeypatch)
    assert none == 0
    assert (some > 0) == (not row.in_cache)
    assert_same(at_once, one_by_one)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", [LIMITS[0], *LOSSY, QUEST, LSERVE, STORED[0]], ids=named)
@torch.no_grad()
def test_on_a_gpu(row: Row, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding before and within the text; with graphs, and without. Packed blocks of 4 tokens go one by one."""
    need("cuda")
    case = BY_NAME["llama_wide_heads"]
    model = case.build()
    model.config.head_dim = 64
    torch.manual_seed(0)
    model = type(model)(model.config).eval().cuda().to(dtype)
    ids, mask = case.prompt(60, rows=3).cuda(), torch.ones(3, 60, dtype=torch.int64, device="cuda")
    mask[0, :5] = mask[1, 20:33] = mask[2, 39] = mask[2, 44] = 0
    calls = [17, *[1] * 43]
    given = []
    for devices, graphs in ((set(), False), ({"cuda"}, False), ({"cuda"}, True)):
        monkeypatch.setattr(layer, "DEVICES", devices)
        dispatch._LAST.clear()
        lc.patch(model, row.method(case), cuda_graph=graphs)
        given.append(told(model, ids, calls, mask).float())
        used = dispatch.last_used().get("attend_layer")
        assert used == ("compiled" if devices and not row.in_cache and row.name != "lserve" else None)
    one_by_one, at_once, replayed = (
        x[:, :18] if row in (QUEST, LSERVE, *STORED) else x for x in given
    )  # then they choose
    scale = 0.05 * float(one_by_one.abs().max())
    torch.testing.assert_close(at_once, one_by_one, rtol=0.05, atol=scale)
    torch.testing.assert_close(replayed, one_by_one, rtol=0.05, atol=scale)


class Made(TorchDispatchMode):
    """Shapes of what is made without a value."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "empty" in func.name():
            self.shapes.append(out.shape)
        return out


@torch.no_grad()
def test_heads_side_by_side_are_made_only_where_a_group_puts_its_own_there() -> None:
    case = BY_NAME["llama"]
    model, ids = lc.patch(case.make(), LOSSY[1].method(case)), case.prompt(41)
    heads, dim = case.kv_heads * case.groups, 64 // (case.kv_heads * case.groups)
    with Made() as prompt:
        cache = model(ids[:, :40], use_cache=True).past_key_values
    with Made() as step:
        model(ids[:, 40:], past_key_values=cache)
    assert torch.Size((1, 40, heads, dim)) in prompt.shapes
    assert torch.Size((1, 1, heads, dim)) not in step.shapes
