"""`attend_layer`: a decode step of a layer against the operations that define it, and, on a GPU, its kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_longctx.kernels import ops
from hf_longctx.kernels.compiled import library
from hf_longctx.kernels.compiled import step as compiled
from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.kernels.ops import Choice, GroupStep, Logits, Packed, Visibility
from hf_longctx.kernels.reference.step import attend_layer as one_by_one

from .built import need

BLOCK = 16


@dataclass(frozen=True)
class Case:
    """What a layer is like; everything else is drawn from `seed`.

    Args:
        groups: KV heads of each group, by their numbers in the layer.
        kinds: of each group: `all` is read, a `window`, the blocks `chosen` now, or `kept` from before.
        group: query heads of a KV head.
        room: slots of what has no window.
        ends: position of each row's token, -1 for a row without one.
        bits: of stored keys and values, or None.
        take: blocks, beside one of sinks and two local ones.
        share: who shares a choice.
        subs: sub-blocks of a block.
        odd: softcap, sink logits and slopes.
        sinks: sink logits alone.
        channels: of queries that are not zero; fewer of them make more scores alike.
    """

    groups: tuple[tuple[int, ...], ...] = ((0, 1),)
    kinds: tuple[str, ...] = ("chosen",)
    group: int = 4
    dim: int = 128
    room: int = 512
    ends: tuple[int, ...] = (500, 200)
    dtype: torch.dtype = torch.bfloat16
    bits: int | None = None
    take: int = 9
    share: str = "kv_head"
    subs: int = 1
    odd: bool = False
    sinks: bool = False
    channels: int = 256
    seed: int = 0

    @property
    def kv_heads(self) -> int:
        """Of the layer."""
        return sum(map(len, self.groups))


SINK, WINDOW = 4, 60
BASE = Case()
FORMATS = [(torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, 8), (torch.float16, 8), (torch.bfloat16, 4)]
MIXED = replace(BASE, groups=((3, 0), (1, 4), (2,)), kinds=("window", "chosen", "all"), ends=(500, -1, 33))
CASES = [
    *(Case(dim=d, dtype=t, bits=bits) for d in (64, 96, 128, 256) for t, bits in FORMATS),
    *(replace(MIXED, dtype=t, bits=bits, seed=1) for t, bits in FORMATS),
    *(replace(MIXED, kinds=("window", "kept", "chosen"), group=g, seed=g) for g in (1, 7, 8, 20)),
    *(replace(BASE, kinds=(kind,), bits=bits) for kind in ("all", "window", "kept") for bits in (None, 4)),
    # all is read, and the token lies anywhere in a slab
    *(replace(BASE, kinds=("all",), dim=d, dtype=t, bits=bits) for d in (64, 96, 256) for t, bits in FORMATS),
    *(replace(BASE, kinds=("all",), bits=bits, ends=(0, 15, 16, 31, 32, 40, -1, 511)) for bits in (None, 8, 4)),
    *(replace(BASE, kinds=("all",), bits=bits, room=40000, ends=(39999, 20001), odd=True) for bits in (None, 4)),
    replace(BASE, kinds=("all",), bits=4, group=20, ends=(100, 3)),
    *(replace(BASE, groups=((1, 0), (2,)), kinds=("chosen", kind), share="all") for kind in ("chosen", "window")),
    *(replace(BASE, ends=(e,), seed=e) for e in (0, 15, 16, 47, 511)),
    replace(BASE, ends=(-1, -1)),
    replace(BASE, subs=4, bits=4),
    replace(BASE, take=30),
    replace(BASE, sinks=True),
    replace(BASE, kinds=("kept",), sinks=True, group=8),
    # slabs for some rounds of warps
    replace(BASE, kinds=("kept",), room=2048, ends=tuple(range(1500, 1516)), take=100),
    *(
        replace(BASE, room=2048, ends=(2000, 1999), channels=c, dtype=t)
        for c, t in ((0, torch.bfloat16), (1, torch.float16))
    ),
    *(
        replace(BASE, groups=((0,),), room=60000, ends=(59990,), take=t, channels=c)
        for t, c in ((600, 256), (90, 0), (40, 1))
    ),
    replace(BASE, groups=((0,), (1,)), kinds=("chosen", "chosen"), room=60000, ends=(59990,), bits=4),
    replace(BASE, groups=((1, 0),), subs=2, room=40000, ends=(39999, 20000), take=50),
    # short rows, each KV head's by a cluster: all that it may have, other shapes, scores alike, and few blocks
    *(
        replace(BASE, groups=((2, 0, 3, 1),), group=g, room=45056, ends=(44990, -1), take=t, sinks=g > 1, seed=g)
        for g, t in ((1, 125), (7, 100), (8, 50))
    ),
    *(
        replace(BASE, room=45056, ends=(e, e - 10000, 3000), take=125, channels=c, seed=e)
        for e, c in ((45055, 256), (32768, 0), (32775, 1), (32767, 2))
    ),
    replace(BASE, groups=((0,),), room=33024, ends=(32770, 32759, 32760, 32761, 1999, 2000, 63, 2040), take=125),
    replace(MIXED, odd=True),
    replace(MIXED, odd=True, dtype=torch.float16, bits=8),
    replace(BASE, groups=(tuple(range(0, 40, 2)), tuple(range(1, 40, 2))), kinds=("window", "chosen"), group=1, dim=64),
    replace(BASE, groups=((0,), (1,)), kinds=("chosen", "chosen"), room=20000, ends=(19990,), take=100, dim=64),
]
LARGE = Case(
    groups=(tuple(range(0, 8, 2)), tuple(range(1, 8, 2))),
    kinds=("window", "chosen"),
    room=40000,
    ends=(39900,),
    take=60,
)


def made(case: Case, device: str) -> tuple[Any, ...]:
    """Arguments of a call, with stores of their own; on a GPU, what nobody sees is NaN."""
    generator = torch.Generator().manual_seed(case.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype).to(device)

    rows, q_heads = len(case.ends), case.group * case.kv_heads
    q = random(rows, q_heads, 1, case.dim)
    q[..., case.channels :] = 0
    k, v = random(rows, case.kv_heads, 1, case.dim), random(rows, case.kv_heads, 1, case.dim)
    logits = Logits(case.dim**-0.5)
    if case.odd:
        slopes = torch.rand(q_heads, generator=generator).to(device) / 8
        logits = Logits(case.dim**-0.5, 3.0, random(q_heads).float(), slopes)
    if case.sinks:
        logits = Logits(case.dim**-0.5, sink_logits=random(q_heads).float())
    pos = torch.tensor(case.ends, device=device)[:, None]
    groups = [_group(case, heads, kind, pos, random) for heads, kind in zip(case.groups, case.kinds, strict=True)]
    return q, k, v, logits, groups


def _group(case: Case, heads: tuple[int, ...], kind: str, pos: Tensor, random: Any) -> GroupStep:
    rows, slots = len(case.ends), SINK + WINDOW if kind == "window" else case.room
    keys, values = (random(rows, len(heads), slots, case.dim) for _ in "kv")
    stores = [x if case.bits is None else ops.encode_kv(x, case.bits) for x in (keys, values)]
    held = _held(case, slots, kind, pos.device)
    for x in stores if pos.is_cuda else ():
        plain = x if isinstance(x, Tensor) else x.scale
        plain.masked_fill_((held < 0).view(rows, 1, slots, *[1] * (plain.ndim - 3)), torch.nan)
    if kind in ("all", "window"):
        see = Visibility(SINK, WINDOW, pos, held) if kind == "window" else Visibility(q_pos=pos)
        ring = WINDOW if kind == "window" else None
        return GroupStep(heads, *stores, SINK if ring else 0, ring, None, 1, see, slots)
    sub = BLOCK // case.subs
    sums = (keys if case.bits is None else ops.decode_kv(stores[0])).nan_to_num()
    cut = torch.unflatten(sums, 2, (-1, sub))
    bounds = torch.stack((cut.amin(3), cut.amax(3)), 3)
    beyond = torch.arange(bounds.shape[2], device=pos.device) * sub > pos
    low, high = (torch.tensor(x, dtype=case.dtype, device=pos.device) for x in (torch.inf, -torch.inf))
    empty = torch.stack((low, high))[None, None, None, :, None]
    bounds = torch.where(beyond[:, None, :, None, None], empty, bounds)
    last = torch.where(pos < 0, -1, pos // BLOCK)
    lists = 1 if case.share == "all" else len(heads)
    choice = Choice(bounds, case.subs, case.share, (last - 1).clamp(min=0), last, 1, case.take, 2)
    ids = torch.full((rows, lists, 1, choice.size), -7, dtype=torch.int32, device=pos.device)
    if kind == "kept":
        steps = torch.arange(choice.size, device=pos.device) * max(1, case.room // BLOCK // choice.size)
        wanted = torch.where(steps < last, steps, -1).sort(descending=False).values
        ids.copy_(torch.cat((wanted[:, 1:], last), 1)[:, None, None])
        ids.copy_(torch.where(ids < 0, 1 << 20, ids).sort().values)
        ids.masked_fill_(ids == 1 << 20, -1)
    return GroupStep(
        heads,
        *stores,
        0,
        None,
        bounds,
        sub,
        Visibility(q_pos=pos),
        slots,
        ids,
        BLOCK,
        choice if kind == "chosen" else None,
    )


def _held(case: Case, slots: int, kind: str, device: torch.device) -> Tensor:
    """Position in each slot once the token is stored, -1 for none: `[B, slots]`."""
    end, slot = torch.tensor(case.ends)[:, None], torch.arange(slots)[None]
    held = slot.expand(len(end), -1)
    if kind == "window":
        rounds = (end - slot).clamp(min=0) // WINDOW
        held = torch.where(slot < SINK, slot, slot + rounds * WINDOW)
    held = torch.where(held <= end, held, -1)
    return held.to(device)


def copied(x: Any) -> Any:
    """Arguments in memory of their own; bounds that a choice reads stay those that are written."""
    if isinstance(x, Tensor):
        return x.clone()
    if isinstance(x, Packed):
        return replace(x, payload=x.payload.clone(), scale=x.scale.clone(), zero=x.zero.clone())
    if isinstance(x, GroupStep):
        bounds = copied(x.bounds)
        choice = None if x.choice is None else replace(x.choice, summary=bounds)
        return replace(x, k=copied(x.k), v=copied(x.v), bounds=bounds, ids=copied(x.ids), choice=choice)
    return [copied(y) for y in x] if isinstance(x, list) else x


def written(groups: list[GroupStep]) -> list[Tensor]:
    """What a call may have changed."""
    stores = [y for x in groups for one in (x.k, x.v) for y in ((one,) if isinstance(one, Tensor) else one.tensors)]
    return [*stores, *(y for x in groups for y in (x.bounds, x.ids) if y is not None)]


def assert_same(mine: tuple[Any, ...], others: tuple[Any, ...], out: Tensor, expected: Tensor) -> None:
    """What is stored and chosen to the bit; results up to the order in which they are summed up."""
    for a, b in zip(written(mine[4]), written(others[4]), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True)
    eps = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.float(), expected.float(), atol=2 * eps, rtol=2 * eps)


@pytest.fixture
def clean() -> Iterator[None]:
    """Counters are zero after as before."""
    yield
    torch.cuda.synchronize()
    assert all(not x.any() for held in library._COUNTERS.values() for x in held)


@pytest.mark.parametrize("case", [BASE, MIXED, replace(MIXED, bits=4), replace(BASE, share="all")], ids=str)
def test_definition(case: Case) -> None:
    """The token is stored, and what is read is what a loop over heads reads."""
    q, k, v, logits, groups = made(case, "cpu")
    with use_backend("reference"):
        out = ops.attend_layer(q, k, v, logits, groups)
        assert out.shape == (len(case.ends), 1, q.shape[1], case.dim)
        assert not out.isnan().any()
        for group in groups:
            for i, head in enumerate(group.heads):
                for row, end in enumerate(case.ends):
                    slot = end if group.ring is None or end < SINK else SINK + (end - SINK) % WINDOW
                    stored = group.k if isinstance(group.k, Tensor) else ops.decode_kv(group.k)
                    if end >= 0:
                        torch.testing.assert_close(stored[row, i, slot], k[row, head, 0], atol=0.5, rtol=0.1)
    for group, before in zip(groups, made(case, "cpu")[4], strict=True):
        assert (group.ids is None) == (before.ids is None)
        if group.choice is not None:
            assert group.ids is not None
            assert not torch.equal(group.ids, before.ids)
            last = group.choice.high[:, :, None, None]
            assert ((group.ids == last) | (last < 0)).any(3).all()


@pytest.mark.cuda
@pytest.mark.usefixtures("poisoned", "clean")
@pytest.mark.parametrize("case", [*CASES, LARGE], ids=str)
def test_as_one_by_one(case: Case) -> None:
    need("cuda")
    mine = made(case, "cuda")
    again, others = (tuple(copied(x) for x in mine) for _ in range(2))
    assert compiled.reject(*mine) is None
    out = compiled.attend_layer(*mine)
    expected = one_by_one(*others)
    torch.cuda.synchronize()
    assert_same(mine, others, out, expected)
    assert torch.equal(compiled.attend_layer(*again), out)
    for a, b in zip(written(again[4]), written(mine[4]), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True)


@pytest.mark.cuda
@pytest.mark.usefixtures("poisoned", "clean")
@pytest.mark.parametrize(
    "kinds",
    [("window", "chosen"), ("window", "kept"), ("chosen", "chosen"), ("all", "kept"), ("all", "all"), ("chosen",)],
    ids=str,
)
@pytest.mark.parametrize("bits", [None, 4])
def test_layers_that_follow_each_other_in_a_graph(kinds: tuple[str, str], bits: int | None) -> None:
    """Layers share scratch and counters; a token's place, and what is chosen, change from replay to replay."""
    need("cuda")
    case = replace(LARGE, kinds=kinds, bits=bits, ends=(39700, 3000))
    if len(kinds) == 1:
        case = replace(case, groups=((1, 0, 3, 2),))
    layers = [made(replace(case, seed=seed), "cuda") for seed in range(3)]
    pos = layers[0][4][0].see.q_pos
    layers = [_at(layer, pos) for layer in layers]
    others = [tuple(copied(x) for x in layer) for layer in layers]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for layer in layers:
            compiled.attend_layer(*(copied(x) for x in layer))
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        outs = [compiled.attend_layer(*layer) for layer in layers]
    for _ in range(40):
        graph.replay()
        expected = [one_by_one(*other) for other in others]
        torch.cuda.synchronize()
        for mine, other, out, known in zip(layers, others, outs, expected, strict=True):
            assert_same(mine, other, out, known)
            for x, y in zip(mine[:3], other[:3], strict=True):
                x.mul_(-1.01), y.mul_(-1.01)
        pos.add_(1)
        for layer in (layers[0], others[0]):
            for group in layer[4]:
                if group.choice is not None:
                    group.choice.high.copy_(pos // BLOCK)
                    group.choice.low.copy_(pos // BLOCK - 1)


def _at(layer: tuple[Any, ...], pos: Tensor) -> tuple[Any, ...]:
    """The same where `pos` says, without a table of what a window's slots hold."""
    groups = [
        replace(group, see=replace(group.see, q_pos=pos, k_pos=None, window=None, sink=0), sink=0, ring=None)
        if group.ring is not None
        else replace(group, see=replace(group.see, q_pos=pos))
        for group in layer[4]
    ]
    return (*layer[:4], groups)


@pytest.mark.cuda
@pytest.mark.usefixtures("clean")
def test_streams_do_not_meet() -> None:
    need("cuda")
    layers = [made(replace(LARGE, seed=seed), "cuda") for seed in range(4)]
    others = [tuple(copied(x) for x in layer) for layer in layers]
    expected = [one_by_one(*other) for other in others]
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    for _ in range(50):
        outs = []
        for stream, layer in zip(streams, layers, strict=True):
            with torch.cuda.stream(stream):
                outs.append(compiled.attend_layer(*layer))
        torch.cuda.synchronize()
        for mine, other, out, known in zip(layers, others, outs, expected, strict=True):
            assert_same(mine, other, out, known)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"see": Visibility()}, "where tokens stand"),
    ({"ids": torch.zeros(2, 8, 1, 9, dtype=torch.int32)}, "for each KV head, or one for all"),
]


@pytest.mark.cuda
@pytest.mark.parametrize(("changed", "reason"), REFUSED)
def test_what_it_does_not_take(changed: dict[str, Any], reason: str) -> None:
    need("cuda")
    q, k, v, logits, groups = made(BASE, "cuda")
    assert reason in str(compiled.reject(q, k, v, logits, [replace(groups[0], **changed)]))
    assert "one query a row" in str(compiled.reject(q.expand(-1, -1, 2, -1), k, v, logits, groups))
    shared = replace(groups[0].choice, share="q_head")
    assert "each query head" in str(compiled.reject(q, k, v, logits, [replace(groups[0], choice=shared)]))


def test_it_is_for_cuda() -> None:
    need("cpu")
    assert "for CUDA" in str(compiled.reject(*made(BASE, "cpu")))
