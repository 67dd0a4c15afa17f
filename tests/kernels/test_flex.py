"""Attention with gradients on a GPU: which blocks are read, and that forward and backward are the definition's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from hf_longctx import use_backend
from hf_longctx.kernels import dispatch, flex, ops
from hf_longctx.kernels.ops import Selection, Visibility
from hf_longctx.kernels.reference.weigh import positions, visible

from .prefills import Case, made

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LISTS = Case((1, 2, 2, 300, 300, 64), F32, lists=(128, 128, "some"))
CASES = [
    LISTS,
    replace(LISTS, dtype=BF16, sizes=(2, 2, 4, 300, 900, 128), share="kv_head"),
    replace(LISTS, dtype=F16, sizes=(2, 1, 3, 512, 512, 64), share="all", lists=(128, 256, "some")),
    replace(LISTS, sizes=(2, 2, 1, 300, 300, 32), ends=(299, 150)),
    replace(LISTS, lists=(128, 128, "own")),
    Case((1, 2, 2, 600, 700, 64), F32, sink=4, window=100),
    Case((1, 1, 3, 600, 700, 64), BF16, sink=200, window=300),
    Case((2, 2, 2, 700, 700, 128), BF16, ends=(699, 350), sink=4, window=129),
    Case((2, 2, 2, 300, 700, 64), F32, ends=(699, 350)),
    Case((1, 2, 1, 300, 700, 64), F16, window=1),
]


def blocks_of(seen: Tensor, q_block: int, block: int) -> Tensor:
    """`[B, N, M, q_block, block]`, with pairs beyond the last ones not seen."""
    rows = pad(seen, (0, -seen.shape[2] % block, 0, -seen.shape[1] % q_block))
    return rows.unflatten(2, (-1, block)).unflatten(1, (-1, q_block)).transpose(2, 3)


@given(
    tokens=st.integers(1, 600),
    before=st.integers(0, 600),
    sink=st.integers(0, 300),
    window=st.none() | st.integers(1, 400),
    padded=st.integers(0, 200),
)
def test_blocks_hold_every_pair_that_is_seen(
    tokens: int, before: int, sink: int, window: int | None, padded: int
) -> None:
    stored = tokens + before
    see = Visibility(sink, window)
    if padded:
        places = torch.stack((torch.arange(stored), (torch.arange(stored) - padded).clamp(min=-1)))
        see = Visibility(sink, window, places[:, before:], places)
    q_pos, k_pos = positions(see, tokens, stored, torch.device("cpu"))
    some, whole = (x[:, 0] for x in flex.seen_blocks(see, q_pos, k_pos))
    pairs = blocks_of(visible(see, q_pos, k_pos), flex.BLOCK, flex.BLOCK)
    assert not (some & whole).any()
    assert torch.equal((some | whole) & pairs.any((3, 4)), pairs.any((3, 4)))
    assert not (whole & ~pairs.all(-1).all(-1)).any()
    if see.aligned:  # and no block for nothing
        assert torch.equal(some | whole, pairs.any((3, 4)))


def test_blocks_that_were_chosen() -> None:
    ids = torch.tensor([[[[0, -1, -1], [0, 1, 3], [1, 2, -1]]]], dtype=torch.int32)
    places = positions(Visibility(), 300, 390, torch.device("cpu"))[0]
    some, whole = flex.chosen_blocks(Selection(ids, 128, 128), Visibility(), places, 390, 2)
    assert some.shape == whole.shape == (1, 2, 3, 4)
    # queries 90 to 217, 218 to 345, 346 to 389: a block is read as a whole if it ends before the first of them
    assert some[0, 1].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 0]]
    assert whole[0, 0].int().tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    padded = Visibility(q_pos=places, k_pos=torch.arange(390)[None])
    some, whole = flex.chosen_blocks(Selection(ids, 128, 128), padded, places, 390, 2)
    assert not whole.any()
    assert some[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 1], [0, 1, 1, 0]]


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"lap": 100}, "cannot turn queries to keys at lap positions"),
    ({"softcap": 2.0}, "has no softcap, learned sinks or ALiBi"),
    ({"sink_logits": True}, "has no softcap, learned sinks or ALiBi"),
    ({"sizes": (1, 1, 1, 9, 9, 80)}, "takes 16, 32, 64, 128, 256 channels"),
    ({"lists": None}, "leaves plain causal attention, and windows without padding, to torch"),
    (
        {"lists": None, "sink": 4, "window": 20},
        "leaves plain causal attention, and windows without padding, to torch",
    ),
    ({"pages": True}, "reads blocks where they lie in the text"),
    ({"lists": (64, 128, "some")}, "takes blocks of a multiple of 128 queries and keys"),
]


class OnCuda(Tensor):
    """A tensor of the host that says that it lies on a GPU."""

    device = torch.device("cuda")  # type: ignore[assignment]


@pytest.mark.parametrize(("options", "reason"), REJECTED)
def test_what_it_does_not_take(options: dict[str, Any], reason: str) -> None:
    q, *rest = made(replace(LISTS, **options), "cpu")
    assert flex.reject(q.requires_grad_(), *rest) == "trains on CUDA devices only"
    q = q.detach().as_subclass(OnCuda)
    assert flex.reject(q, *rest) == "is for gradients"
    assert flex.reject(q.requires_grad_(), *rest) == reason


def results(arguments: tuple[Any, ...], weights: Tensor) -> list[Tensor]:
    """The output and the gradients of queries, keys and values."""
    leaves = [x.detach().requires_grad_() for x in arguments[:3]]
    out = ops.attend_blocks(*leaves, *arguments[3:])
    out.backward(weights.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition(case: Case) -> None:
    """Errors are at most twice those of the definition in its dtype, and 4 ulp: products are rounded once more.

    In float32 it is 8 ulp: the exponential is the device's own, which has two bits less.
    """
    torch.manual_seed(0)
    arguments = made(case, "cuda")
    tensors = [x.nan_to_num() for x in arguments[:3]]
    weights = torch.randn_like(tensors[0])
    with use_backend("reference"):
        exact = results((*(x.double() for x in tensors), *arguments[3:]), weights)
        same = results((*tensors, *arguments[3:]), weights)
    got = results((*tensors, *arguments[3:]), weights)
    assert dispatch.last_used()["attend_blocks"] == "flex"
    for ours, theirs, right in zip(got, same, exact, strict=True):
        ulp = torch.finfo(case.dtype).eps * float(right.abs().max())
        yardstick = float((theirs.double() - right).abs().max())
        assert float((ours.double() - right).abs().max()) <= 2 * yardstick + (8 if case.dtype == F32 else 4) * ulp
    again = results((*tensors, *arguments[3:]), weights)
    assert torch.equal(again[0], got[0])


@pytest.mark.cuda
def test_memory_does_not_grow_with_the_square_of_the_text() -> None:
    q, k, v = (torch.randn(1, n, 1 << 15, 64, dtype=BF16, device="cuda", requires_grad=True) for n in (4, 2, 2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    places = torch.arange(1 << 15, device="cuda")[None]
    out = ops.attend_blocks(q, k, v, ops.Logits(0.125), Visibility(64, 1024, places, places), None)
    assert dispatch.last_used()["attend_blocks"] == "flex"
    out.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 20 * q.nbytes


@pytest.mark.cuda
@pytest.mark.parametrize("chosen", [False, True])
def test_more_lengths_than_torch_compiles_for_by_itself(chosen: bool) -> None:
    """It is not left to code for any length, nor to products of all scores."""
    torch.compiler.reset()
    for tokens in (640, 1000, 1408, 777, 2048, 384, 1500, 901, 1152, 1999):
        case = replace(LISTS, dtype=BF16, sizes=(1, 2, 2, tokens, tokens, 64))
        test_definition(case if chosen else replace(case, lists=None, ends=(tokens - 1,), sink=4, window=100))
