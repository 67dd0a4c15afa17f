"""Every backend against the definition: errors at most twice those of plain torch in the same dtype; gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from hf_longctx.kernels import dispatch, ops
from hf_longctx.kernels.dispatch import use_backend

from .scenes import Scene, scenes

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def eager(q: Tensor, k: Tensor, v: Tensor, logits: ops.Logits, scene: Scene) -> Tensor:
    """Attention as transformers' eager function has it: products and values in the dtype, softmax in float32."""
    see = scene.see
    assert see.q_pos is not None
    assert see.k_pos is not None
    group = q.shape[1] // k.shape[1]
    far = see.q_pos[:, :, None] - see.k_pos[:, None]
    seen = (far >= 0) & (see.k_pos >= 0)[:, None]
    if see.window is not None:
        seen &= (far < see.window) | (see.k_pos < see.sink)[:, None]
    x = (q @ k.repeat_interleave(group, 1).transpose(2, 3)) * logits.scale
    x = x.masked_fill(~seen[:, None], float("-inf"))
    weights = x.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype).nan_to_num()
    return weights @ v.repeat_interleave(group, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("op", ["attend_blocks", "attend_pages"])
@settings(max_examples=80)
@given(scenes(plain=True))
def test_errors_are_those_of_the_dtype(op: str, backend: str, dtype: torch.dtype, scene: Scene) -> None:
    q, k, v, logits, see, turns = scene.arguments(dtype)
    rounded = Scene(q.double(), k.double(), v.double(), logits, scene.see, None)  # inputs as the operation gets them
    with use_backend("reference"):
        exact = ops.attend_blocks(*rounded.arguments(torch.float64))
    with use_backend(backend):
        got = getattr(ops, op)(q, k, v, logits, see, turns)
    assert got.dtype == dtype
    assert got.shape == exact.shape
    yardstick = float((eager(q, k, v, logits, scene).double() - exact).abs().max())
    ulp = torch.finfo(dtype).eps * float(v.abs().max())  # of what is averaged: a mean near 0 has lost some
    assert float((got.double() - exact).abs().max()) <= 2 * yardstick + 2 * ulp


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("window", [7, 8, 9])
@pytest.mark.parametrize("tokens", [8, 1])
def test_a_window_as_long_as_the_text_hides_nothing_and_a_shorter_one_does(
    tokens: int, window: int, backend: str
) -> None:
    """Aligned, where a backend may take a shortcut: eight keys, of which the last query sees `window`."""
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, 4, generator=made).double() for h, n in ((2, tokens), (1, 8), (1, 8)))
    with use_backend(backend):
        for op in (ops.attend_blocks, ops.attend_pages):
            got, other = (op(q, k, v, ops.Logits(0.5), ops.Visibility(0, w), None)[:, :, -1] for w in (window, None))
            last = (q[0, :, -1] @ k[0, 0, -window:].T * 0.5).softmax(-1) @ v[0, 0, -window:]
            torch.testing.assert_close(got[0], last)
            assert torch.allclose(got, other) == (window >= 8)


@settings(max_examples=30)
@given(scenes(most=6))
def test_gradients_of_the_reference_are_right(scene: Scene) -> None:
    q, k, v, logits, see, turns = scene.arguments(torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if logits.sink_logits is not None:
        leaves.append(logits.sink_logits.clone().requires_grad_())

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        given_logits = ops.Logits(logits.scale, logits.softcap, sinks, logits.slopes)
        with use_backend("reference"):
            out = ops.attend_blocks(q, k, v, given_logits, see, turns)
            return out + ops.attend_pages(q, k, v, given_logits, see, turns)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@settings(max_examples=80)
@given(scenes(plain=True))
def test_gradients_of_the_torch_backend_are_those_of_the_reference(scene: Scene) -> None:
    def gradients(backend: str) -> list[Tensor]:
        q, k, v, logits, see, turns = scene.arguments(torch.float64)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with use_backend(backend):
            out = ops.attend_blocks(*leaves, logits, see, turns) + ops.attend_pages(*leaves, logits, see, turns)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return list(torch.autograd.grad((out * weight).sum(), leaves))

    terms = scene.q.shape[1] * scene.q.shape[2] * scene.k.shape[2] + scene.q.shape[3] + scene.v.shape[3]
    largest = float(torch.cat((scene.q.flatten(), scene.k.flatten())).abs().max() * scene.v.abs().max())
    for mine, defined in zip(gradients("torch"), gradients("reference"), strict=True):
        allowed = terms * torch.finfo(torch.float64).eps * max(1.0, largest)
        torch.testing.assert_close(mine, defined, atol=allowed, rtol=0)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"softcap": 1.0}, "has no softcap, learned sinks or ALiBi"),
    ({"sink_logits": torch.zeros(2)}, "has no softcap, learned sinks or ALiBi"),
    ({"slopes": torch.zeros(2)}, "has no softcap, learned sinks or ALiBi"),
    ({}, "cannot turn queries to keys at lap positions"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED)
@pytest.mark.parametrize("op", ["attend_blocks", "attend_pages"])
def test_what_the_torch_backend_refuses_runs_on_the_reference(op: str, options: dict[str, Any], reason: str) -> None:
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    turns = None if options else ops.Turns(torch.zeros(1, 3, dtype=torch.int64), 4, 0, torch.ones(2))
    arguments = (x, x, x, ops.Logits(1.0, **options), ops.Visibility(0, 2), turns)
    with use_backend("torch"), pytest.raises(dispatch.UnsupportedError, match=f"{op}: .*torch: {reason}"):
        getattr(ops, op)(*arguments)
    getattr(ops, op)(*arguments)
    assert dispatch.last_used()[op] == "reference"
