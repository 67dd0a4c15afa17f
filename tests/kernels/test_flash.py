"""FlashAttention 3, where it is installed: what it is asked for, and that nothing breaks where it does not load."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_longctx as lc
from hf_longctx.kernels import dispatch, flash, ops
from hf_longctx.kernels.dispatch import use_backend

LOGITS, SEE = ops.Logits(0.2), ops.Visibility()


def made(tokens: int = 2100, stored: int = 2100, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Queries, keys and values as a model has them."""
    made = torch.Generator().manual_seed(0)
    sizes = ((tokens, 4), (stored, 2), (stored, 2))
    return [torch.randn(2, n, heads, 64, generator=made).to(dtype).transpose(1, 2) for n, heads in sizes]


class Stand:
    """What `flash_attn_interface` promises, in float64, and how it was called."""

    def __init__(self, with_sums: bool) -> None:
        self.with_sums, self.calls = with_sums, 0

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool) -> Any:
        """Of `[B, T, H, D]`."""
        assert causal
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        self.calls += 1
        group = q.shape[2] // k.shape[2]
        q64, k64, v64 = (x.transpose(1, 2).double() for x in (q, k, v))
        k64, v64 = (x.repeat_interleave(group, 1) for x in (k64, v64))
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        weights = (q64 @ k64.mT * softmax_scale).masked_fill(~seen, float("-inf")).softmax(-1)
        out = (weights @ v64).transpose(1, 2).to(q.dtype).contiguous()
        return (out, out.new_zeros(1)) if self.with_sums else out


def forget() -> None:
    """What was found out about this machine."""
    flash._found.cache_clear()
    flash.reason.cache_clear()


@pytest.fixture(params=(False, True))
def stand(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    """A module that computes on this device, as a GPU of sm_90 would."""
    forget()
    found, module = Stand(request.param), ModuleType(flash.MODULE)
    module.flash_attn_func = found.flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setattr(flash, "find_spec", lambda name: name == flash.MODULE)
    monkeypatch.setitem(sys.modules, flash.MODULE, module)
    monkeypatch.setattr(flash, "reason", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    yield found
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("before", [0, 300])
def test_whole_texts_and_queries_that_follow_keys(stand: Stand, before: int) -> None:
    q, k, v = made(2100 - before)
    with torch.no_grad():
        got = ops.attend_blocks(q, k, v, LOGITS, SEE, None)
    assert (stand.calls, dispatch.last_used()["attend_blocks"]) == (1, "flash")
    with use_backend("reference"):
        exact = ops.attend_blocks(*(x.double() for x in (q, k, v)), LOGITS, SEE, None)
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-4)
    assert got.shape == q.shape


def refused() -> dict[str, tuple[Any, ...]]:
    """Arguments that it is not asked for."""
    q, k, v = made()
    pos = torch.arange(2100)[None]
    ids = torch.zeros(1, 2, 9, 1, dtype=torch.int32)
    one, few = made(1), made(2000, 2000)
    single = made(dtype=torch.float32)
    packed = [ops.encode_kv(x.contiguous(), 8) for x in (k, v)]
    wants = q.clone().requires_grad_()
    return {
        "softcap": (q, k, v, ops.Logits(0.2, softcap=30.0), SEE, None),
        "learned sinks": (q, k, v, ops.Logits(0.2, sink_logits=torch.zeros(4)), SEE, None),
        "ALiBi": (q, k, v, ops.Logits(0.2, slopes=torch.ones(4)), SEE, None),
        "a window": (q, k, v, LOGITS, ops.Visibility(4, 64), None),
        "padding": (q, k, v, LOGITS, ops.Visibility(q_pos=pos, k_pos=pos), None),
        "lap positions": (q, k, v, LOGITS, SEE, ops.Turns(pos.clamp(max=63), 60, 4, torch.ones(2))),
        "chosen blocks": (q, k, v, LOGITS, SEE, None, ops.Selection(ids, 128, 128)),
        "more queries than keys": (q, k[:, :, :2080], v[:, :, :2080], LOGITS, SEE, None),
        "one query": (*one, LOGITS, SEE, None),
        "few keys": (*few, LOGITS, SEE, None),
        "float32": (*single, LOGITS, SEE, None),
        "packed keys": (q, *packed, LOGITS, SEE, None),
        "values of fewer channels": (q, k, v[..., :32], LOGITS, SEE, None),
        "gradients": (wants, k, v, LOGITS, SEE, None),
    }


@pytest.mark.parametrize("what", refused())
def test_what_it_is_not_asked_for(stand: Stand, what: str) -> None:
    given = refused()[what]
    assert dispatch.chosen("attend_blocks", *given, *((None,) if len(given) == 6 else ())) != "flash"
    assert flash.reject(*given) is not None


def test_a_window_that_holds_all_is_none(stand: Stand) -> None:
    assert flash.reject(*made(), LOGITS, ops.Visibility(4, 2100), None) is None


def test_where_there_is_no_such_gpu() -> None:
    forget()
    assert flash.reason(torch.device("cpu")) == "is for CUDA devices of sm_90"
    with use_backend("flash"), pytest.raises(lc.UnsupportedError, match="flash: is for CUDA devices of sm_90"):
        ops.attend_blocks(*made(), LOGITS, SEE, None)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device said to be of sm_90."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    forget()
    yield torch.device("cuda", 0)
    monkeypatch.undo()
    forget()


def test_where_it_is_not_installed(hopper: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "find_spec", lambda name: None)
    assert flash.reason(hopper) == "needs flash_attn_interface (FlashAttention 3), which is not installed"


@pytest.mark.parametrize(
    ("error", "said"), [(ImportError("undefined symbol: x\nmore"), "undefined symbol: x"), (OSError(), "OSError")]
)
def test_where_it_does_not_load(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(flash, "find_spec", lambda name: True)
    monkeypatch.setattr(flash, "import_module", fail)
    assert flash.reason(hopper) == f"cannot load flash_attn_interface: {said}"


def test_on_another_gpu(hopper: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert flash.reason(hopper) == "is for CUDA devices of sm_90; this GPU is sm_89"


@pytest.mark.cuda
@pytest.mark.parametrize("dim", flash.DIMS)
@pytest.mark.parametrize("before", [0, 1, 1300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dim: int, before: int, dtype: torch.dtype) -> None:
    """Errors are at most twice those of the definition in the same dtype, and 2 ulp."""
    without = flash.missing()
    if without:
        pytest.skip(f"FlashAttention 3 {without}")
    made = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(2, n, heads, dim, generator=made, device="cuda", dtype=dtype).transpose(1, 2)
        for n, heads in ((2500 - before, 4), (2500, 2), (2500, 2))
    )
    logits = ops.Logits(dim**-0.5)
    with torch.no_grad(), use_backend("flash"):
        got = ops.attend_blocks(q, k, v, logits, SEE, None)
    with use_backend("reference"):
        same = ops.attend_blocks(q, k, v, logits, SEE, None)
        exact = ops.attend_blocks(*(x.double() for x in (q, k, v)), logits, SEE, None)
    ulp = torch.finfo(dtype).eps * float(exact.abs().max())
    yardstick = float((same.double() - exact).abs().max())
    assert float((got.double() - exact).abs().max()) <= 2 * yardstick + 2 * ulp
