"""What HF_LONGCTX_DEBUG has looked at: lists, places and slots that are refused; what they do where nobody looks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_longctx.kernels import delta, dispatch, ops
from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.kernels.ops import Logits, Selection, Visibility

from . import deltas, test_moves, test_step
from .built import need

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture
def _checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_CHECKED", True)


def ids_of(*blocks: int) -> Tensor:
    return torch.tensor(blocks, dtype=torch.int32).view(1, 1, 1, -1)


def read(ids: Tensor, pages: Tensor | None = None, op: Callable[..., Any] = ops.attend_blocks, end: int = 39) -> Any:
    """Two queries, the last of which stands at `end`, and ten blocks of four keys."""
    q, k = torch.ones(1, 2, 2, 8), torch.ones(1, 1, 40, 8)
    see = Visibility(q_pos=torch.tensor([[end - 1, end]]))
    return op(q, k, k, Logits(1.0), see, None, Selection(ids, 4, 2, pages))


LISTS = [
    ((0, 3, 2), "lists of blocks that ascend, then -1; got [0, 3, 2]. Sort each list"),
    ((0, 3, 3), "lists of blocks that ascend, then -1; got [0, 3, 3]"),
    ((0, -1, 3), "lists of blocks that ascend, then -1; got [0, -1, 3]"),
    ((0, 3, -7), "lists of blocks that ascend, then -1; got [0, 3, -7]"),
    ((0, 3, 10), "blocks from 0 to 9; got [0, 3, 10]. Leave out blocks that are not stored"),
]


@pytest.mark.usefixtures("_checked")
@pytest.mark.parametrize("op", [ops.attend_blocks, ops.attend_pages])
@pytest.mark.parametrize(("blocks", "said"), LISTS)
def test_lists(blocks: tuple[int, ...], said: str, op: Callable[..., Any]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole text is looked at
        read(ids_of(*blocks), op=op)
    assert f"{op.__name__}: expected {said}" in str(error.value)


@pytest.mark.usefixtures("_checked")
def test_pages_and_blocks_to_come() -> None:
    with pytest.raises(ValueError, match=r"pages from 0 to 9; got \[4, 10, -1\]"):
        read(ids_of(0, 30, -1), ids_of(4, 10, -1), ops.attend_pages)
    with pytest.raises(ValueError, match=r"attend_blocks: expected blocks that begin at or before .* got \[0, 5\]"):
        read(ids_of(0, 5), end=19)
    read(ids_of(0, 5), end=20)
    read(ids_of(0, 5), end=19, op=ops.attend_pages)  # chosen for some steps


@pytest.mark.usefixtures("_checked")
def test_lists_of_other_operations() -> None:
    scene = test_moves.Scene(test_moves.Case(), "cpu")
    ids = ids_of(1, 1).expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="bring_blocks: expected lists of blocks that ascend"):
        ops.bring_blocks(*scene.first, ids, torch.tensor([50]), scene.held, scene.counts, test_moves.PLACES)
    q, k, v, logits, groups = test_step.made(replace(test_step.BASE, kinds=("kept",)), "cpu")
    groups[0].ids[0, 0, 0, :2] = 5
    with pytest.raises(ValueError, match="attend_layer: expected lists of blocks that ascend"):
        ops.attend_layer(q, k, v, logits, groups)


PLACES: list[tuple[Callable[[], None], str]] = [
    (lambda: store([[8]]), r"append_pages: expected tokens whose slots are below 8; got \[8\]. Make room"),
    (lambda: store([[3, 3]]), r"append_pages: expected tokens that each have a slot; got \[3, 3\]"),
    (lambda: store([[2, 8]], 2, 6), r"append_pages: expected tokens that each have a slot; got \[2, 8\]"),
    (lambda: store([[2, 9]], 2, 7), r"append_pages: expected tokens whose slots are below 8|each have a slot"),
    (lambda: put(7), r"append: expected slots below 8; got 7 to 8. Make room first"),
    (lambda: put(torch.tensor([[0, 8]])), r"append: expected slots below 8; got \[0, 8\]"),
    (lambda: put(torch.tensor([[-1, 0]])), r"append: expected slots below 8; got \[-1, 0\]"),
]


def store(pos: list[list[int]], sink: int = 0, ring: int | None = None) -> None:
    fresh = torch.ones(1, 1, len(pos[0]), 4)
    ops.append_pages(*torch.zeros(2, 1, 1, 8, 4), fresh, fresh, torch.tensor(pos), sink, ring, None, 1)


def put(slots: Any) -> None:
    ops.append(torch.zeros(1, 1, 8, 4), torch.ones(1, 1, 2, 4), slots)


@pytest.mark.usefixtures("_checked")
@pytest.mark.parametrize(("run", "said"), PLACES)
def test_places(run: Callable[[], None], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run()


@pytest.mark.usefixtures("_checked")
def test_what_is_fine_is_let_through() -> None:
    store([[7]])
    store([[-1, -1]])
    store([[6, 7, 8]], 2, 6)
    put(6)
    ops.append(torch.zeros(1, 1, 8, 4), torch.ones(1, 1, 2, 4), torch.tensor([[0, 7]]), torch.tensor([[True, False]]))
    read(ids_of(-1, -1))


@pytest.mark.usefixtures("_checked")
def test_slots_that_there_are_not() -> None:
    x, base, bits, scales, slots = deltas.make(deltas.Case(3, 64, 8, 2, 1), torch.float32)
    args = (x, base, bits, scales, torch.tensor([[0], [2], [-1]], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"delta_linear: expected slots from -1 to 1; got \[2\]"):
        dispatch.call("delta_linear", *args)
    assert delta.delta_linear(x, base, bits, scales, slots).shape == base.shape


@pytest.mark.usefixtures("_checked")
def test_weights_that_there_are_not() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"rms_norm: expected numbers of weights from 0 to 1; got \[0, 2\]"):
        ops.rms_norm(x, x, 1e-5, 0.0, True, torch.tensor([0, 2]))
    assert ops.rms_norm(x, x, 1e-5, 0.0, True, torch.tensor([0, 1])).shape == x.shape


def test_the_variable_turns_it_on() -> None:
    code = "from hf_longctx.kernels import dispatch; print(dispatch._CHECKED)"
    said = subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "HF_LONGCTX_DEBUG": "1"})
    assert said.decode().strip() == "True"
    assert bool(os.environ.get("HF_LONGCTX_DEBUG")) == dispatch._CHECKED


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True])
def test_unlooked_at_what_points_outside_is_not_read(packed: bool, device: str) -> None:
    """A list's blocks behind the stored ones, and those that are to come, are as if they were not in it."""
    need(device)
    made = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(1, n, t, 64, generator=made).to(device, dtype) for n, t in ((4, 1), (2, 60), (2, 60)))
    stores = tuple(ops.encode_kv(x, 8) if packed else x for x in (k, v))
    see = Visibility(q_pos=torch.tensor([[45]], device=device))
    outs = []
    for blocks in ((0, 2, 5, -1, -1), (0, 2, 5, 7, 1 << 20)):
        selection = Selection(ids_of(*blocks).to(device), 8, 1)
        for op in (ops.attend_pages, ops.attend_blocks):
            outs.append(op(q, *stores, Logits(0.1), see, None, selection))
    for one in outs[2:]:
        assert one.isfinite().all()
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_that_are_outside_of_a_store_are_never_written(device: str) -> None:
    need(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    whole = torch.zeros(2, 1, 3, 8, 64, dtype=dtype, device=device)
    stores = [x[:, 1:2] for x in whole]
    fresh = torch.ones(1, 1, 1, 64, dtype=dtype, device=device)
    args = (*stores, fresh, fresh, torch.tensor([[8]], device=device), 0, None, None, 1)
    with use_backend("compiled"):
        if device == "cpu":
            with pytest.raises(RuntimeError, match="expected positions within the store's capacity"):
                ops.append_pages(*args)
        else:
            ops.append_pages(*args)
    assert not whole.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", ["reference", "torch", "compiled"])
def test_keys_that_are_no_numbers_spoil_the_rows_that_see_them_and_no_others(
    backend: str, odd: float, device: str
) -> None:
    made = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(2, n, t, 64, generator=made).to(device, dtype) for n, t in ((4, 2), (2, 60), (2, 60)))
    k[0, 1, 30] = odd  # one row, one KV head: query heads 2 and 3
    see = Visibility(q_pos=torch.tensor([[29, 30], [29, 30]], device=device))
    if backend == "compiled":
        need(device)
    with use_backend(backend):
        spoiled = ops.attend_pages(q, k, v, Logits(0.1), see, None)
        clean = ops.attend_pages(q, k.nan_to_num(posinf=0.0), v, Logits(0.1), see, None)
    sees = torch.zeros_like(spoiled[..., 0], dtype=torch.bool)
    sees[0, 2:, 0 if backend == "torch" else 1 :] = True  # torch's own lets a key that is masked spoil its row, too
    assert torch.equal(spoiled[~sees], clean[~sees])
    assert spoiled[0, 2:, 1].isnan().all() or odd == torch.inf


@pytest.mark.parametrize(("block", "stride", "queries"), [(16, 5, 32), (16, 4, 30)])
def test_tiles_that_are_no_part_of_a_block(block: int, stride: int, queries: int) -> None:
    q, k = torch.ones(1, 1, queries, 8), torch.ones(1, 1, 40, 8)
    with pytest.raises(ValueError, match="score_antidiagonal: expected a block of whole tiles"):
        ops.score_antidiagonal(q, k, torch.arange(queries)[None], block, stride, 1.0, True)


@pytest.mark.parametrize(
    ("op", "device"),
    [
        (ops.attend_blocks, "cpu"),
        (ops.attend_pages, "cpu"),
        pytest.param(ops.attend_pages, "cuda", marks=pytest.mark.cuda),
    ],
)
def test_fewer_keys_than_queries_and_no_queries(op: Callable[..., Any], device: str) -> None:
    """The last query stands at the last key: those before the first see nothing, and give zeros."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k = (torch.ones(1, n, t, 64, dtype=dtype, device=device) for n, t in ((2, 6), (1, 4)))
    out = op(q, k, k, Logits(1.0), Visibility(), None)
    assert torch.equal(out[:, :, :2], torch.zeros_like(out[:, :, :2]))
    assert torch.equal(out[:, :, 2:], torch.ones_like(out[:, :, 2:]))
    assert op(q[:, :, :0], k, k, Logits(1.0), Visibility(), None).shape == (1, 2, 0, 64)
