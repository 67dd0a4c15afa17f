"""What a prompt of 128K tokens reads on a GPU, at some blocks of queries, against the definition in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hf_longctx.kernels import ops
from hf_longctx.kernels.compiled import antidiagonal, prefill
from hf_longctx.kernels.dispatch import use_backend

from .built import need

pytestmark = [pytest.mark.cuda, pytest.mark.slow]

TOKENS, BLOCK, STRIDE, DIM = 1 << 17, 128, 16, 128
Q_HEADS, KV_HEADS = 32, 8
BLOCKS = TOKENS // BLOCK
SAMPLES = (0, 1, 517, 790, BLOCKS - 2, BLOCKS - 1)
"""Blocks of queries that are looked at: the first and the last ones, and two between."""

GIGABYTES = 16
"""What the device holds at most, so that a test of this length can run beside others."""


@pytest.fixture(scope="module")
def text() -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys as a model makes them, heads of a token side by side, which share a topic in each block."""
    need("cuda")
    made = torch.Generator("cuda").manual_seed(0)
    kind = {"dtype": torch.bfloat16, "device": "cuda", "generator": made}
    ways = torch.randn(13, DIM, **kind)
    own = ways[torch.randint(13, (BLOCKS,), device="cuda", generator=made)].repeat_interleave(BLOCK, 0)
    q, k, v = (torch.randn(1, TOKENS, heads, DIM, **kind).transpose(1, 2) for heads in (Q_HEADS, KV_HEADS, KV_HEADS))
    return q + own, k + own, v


@pytest.fixture
def places() -> Tensor:
    """`[1, samples * BLOCK]`, where the queries stand that are looked at."""
    at = torch.tensor(SAMPLES, device="cuda")[:, None] * BLOCK + torch.arange(BLOCK, device="cuda")
    return at.view(1, -1)


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Nothing of the size of all scores, or of all chosen keys, is ever made."""
    torch.cuda.reset_peak_memory_stats()
    yield
    assert torch.cuda.max_memory_allocated() < GIGABYTES << 30


def lists(most: int) -> Tensor:
    """`[1, Q_HEADS, BLOCKS, most]`, int32: of each block of queries the first block, its own, and others between."""
    made = torch.Generator("cuda").manual_seed(1)
    own = torch.arange(BLOCKS, device="cuda")[None, :, None]
    ids = (torch.rand(Q_HEADS, BLOCKS, most, device="cuda", generator=made) * (own + 1)).long()
    ids[..., :1], ids[..., 1:2] = 0, own
    ids = ids.sort(-1).values
    again = torch.cat((torch.zeros_like(ids[..., :1], dtype=torch.bool), ids[..., 1:] == ids[..., :-1]), -1)
    ids = ids.masked_fill(again, BLOCKS).sort(-1).values
    return ids.masked_fill(ids == BLOCKS, -1).int()[None]


@pytest.mark.parametrize("chosen", [True, False], ids=["lists", "all"])
def test_attention(chosen: bool, text: tuple[Tensor, Tensor, Tensor], places: Tensor) -> None:
    """Errors are at most twice those of the definition in the same dtype, and 2 ulp, KV head by KV head."""
    q, k, v = text
    see, logits = ops.Visibility(), ops.Logits(DIM**-0.5)
    selection = ops.Selection(lists(75), BLOCK, BLOCK) if chosen else None
    got = prefill.attend_blocks(q, k, v, logits, see, None, selection)[:, :, places[0]]
    asked, group = q[:, :, places[0]], Q_HEADS // KV_HEADS
    for head in range(KV_HEADS):
        heads, one = slice(head * group, (head + 1) * group), slice(head, head + 1)
        read = None
        if selection is not None:
            ids = selection.ids[:, heads, list(SAMPLES)]
            read = ops.Selection(ids, BLOCK, BLOCK)
        arguments = (logits, ops.Visibility(q_pos=places), None, read)
        with use_backend("reference"):
            same = ops.attend_blocks(asked[:, heads], k[:, one], v[:, one], *arguments)
            exact = ops.attend_blocks(*(x.double() for x in (asked[:, heads], k[:, one], v[:, one])), *arguments)
        ulp = torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
        yardstick = float((same.double() - exact).abs().max())
        assert float((got[:, heads].double() - exact).abs().max()) <= 2 * yardstick + 2 * ulp


def test_scores_of_blocks(text: tuple[Tensor, Tensor, Tensor], places: Tensor) -> None:
    """As far off as sums of products may be: `test_compiled_antidiagonal`."""
    q, k, _ = text
    rest = (BLOCK, STRIDE, DIM**-0.5, True)
    pos = torch.arange(TOKENS, device="cuda")[None]
    got = antidiagonal.score_antidiagonal(q, k, pos, *rest)[:, :, list(SAMPLES)]
    asked, group = q[:, :, places[0]], Q_HEADS // KV_HEADS
    largest = float(q.norm(dim=-1).amax()) * float(k.norm(dim=-1).amax())
    off = STRIDE * DIM / 16 * torch.finfo(torch.float32).eps * largest * DIM**-0.5
    for head in range(KV_HEADS):
        heads = slice(head * group, (head + 1) * group)
        with use_backend("reference"):
            exact = ops.score_antidiagonal(asked[:, heads].double(), k[:, head : head + 1].double(), places, *rest)
        assert bool(((got[:, heads].double() - exact).abs() <= (2 * off + 1e-5) * exact + 1e-6).all())
        assert abs(float(exact[:, :, -1].sum()) / (group * BLOCK / STRIDE) - 1) < 1e-9
