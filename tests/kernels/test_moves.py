"""Blocks between the device and host memory: against lists, and on a GPU, marked `cuda`, against the definition."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_longctx.kernels import ops
from hf_longctx.kernels.compiled import host as compiled
from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.kernels.types import parts

from .built import need

CPU, PLACES = "cpu", ops.Places(8, 1, 3)
DEVICES = [CPU, pytest.param("cuda", marks=pytest.mark.cuda)]


@dataclass(frozen=True)
class Case:
    """Keys and values in blocks, and how they lie.

    Args:
        rows, heads: sizes; like `pool`, the blocks of the pool.
        places: where blocks lie.
        dims: channels of a key, and of a value.
        bits: of keys, and of values; 0: as `dtype` has them.
        segments: of host memory, and blocks in each.
        seed: of all that is drawn.
    """

    rows: int = 2
    heads: int = 3
    pool: int = 4
    places: ops.Places = PLACES
    dims: tuple[int, int] = (16, 32)
    bits: tuple[int, int] = (0, 0)
    dtype: torch.dtype = torch.bfloat16
    segments: tuple[int, int] = (3, 7)
    seed: int = 0


class Scene:
    """Stores and host memory of random bytes; the same on every device.

    Attributes:
        first: `(k, v, host)`, the first arguments of both operations.
        held, counts: of the pool.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, torch.device(device)
        made = torch.Generator().manual_seed(case.seed)
        slots = (case.places.sinks + case.places.tail + case.pool) * case.places.block
        stores = []
        for dim, bits in zip(case.dims, case.bits, strict=True):
            x = torch.randn(case.rows, case.heads, slots, dim, generator=made).to(case.dtype)
            stores.append(self._moved(ops.encode_kv(x, bits) if bits else x))
        size = sum(case.places.block * x.shape[3] * x.itemsize for store in stores for x in parts(store))
        number, each = case.segments
        drawn = [torch.randint(0, 256, (case.rows, case.heads, each, size), generator=made) for _ in range(number)]
        segments = [x.to(torch.uint8).pin_memory() if device == "cuda" else x.to(torch.uint8) for x in drawn]
        table = torch.tensor([x.data_ptr() for x in segments], device=device) if device == "cuda" else None
        self.first: tuple[Any, ...] = (*stores, ops.HostBlocks(segments, table))
        held = torch.stack([torch.randperm(case.pool, generator=made) for _ in range(case.rows * case.heads)])
        spots = held.view(case.rows, case.heads, case.pool)
        self.held = torch.stack((spots, torch.full_like(spots, -1)), 2).to(self.device, torch.int32)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    def _moved(self, x: Tensor | ops.Packed) -> Tensor | ops.Packed:
        if isinstance(x, Tensor):
            return x.to(self.device)
        return replace(x, payload=x.payload.to(self.device), scale=x.scale.to(self.device), zero=x.zero.to(self.device))

    def bring(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """`ops.bring_blocks`: of the compiled library on a GPU."""
        arguments = (*self.first, ids.to(self.device), lengths.to(self.device), self.held, self.counts)
        if self.device.type == "cuda":
            assert compiled.reject_bring(*arguments, self.case.places) is None
            return compiled.bring_blocks(*arguments, self.case.places)
        return ops.bring_blocks(*arguments, self.case.places)

    def copy(self, first: Tensor, last: Tensor, most: int, out: bool) -> None:
        """`ops.copy_blocks`, likewise."""
        arguments = (*self.first, first.to(self.device), last.to(self.device), most, self.case.places, out)
        if self.device.type == "cuda":
            assert compiled.reject_copy(*arguments) is None
            compiled.copy_blocks(*arguments)
        else:
            ops.copy_blocks(*arguments)

    def settle(self) -> None:
        """Let the host see what the device wrote."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def stored(self) -> Tensor:
        """The bytes of blocks on the device: `[B, H, pages, bytes]`."""
        k, v, _ = self.first
        return torch.cat([x.view(torch.uint8) for x in self.case.places.paged(k, v)], -1).cpu()

    def on_host(self) -> Tensor:
        """The bytes of blocks on the host: `[B, H, blocks, bytes]`."""
        self.settle()
        return torch.cat(self.first[2].segments, 2).clone()


def draw_ids(case: Case, heads: int, width: int, lengths: list[int], seed: int) -> Tensor:
    """`[B, heads, 1, width]`: some sinks, some far blocks, as many as the pool takes, and some near ones."""
    made = torch.Generator().manual_seed(seed)
    places, rows = case.places, []
    for length in (length for length in lengths for _ in range(heads)):
        ids = torch.arange(-(-length // places.block))
        far = places.is_far(ids, torch.tensor(length))
        some = torch.rand(len(ids), generator=made) < 0.6
        chosen = ids[far][torch.randperm(int(far.sum()), generator=made)[: case.pool]]
        chosen = torch.cat((chosen[torch.rand(len(chosen), generator=made) < 0.7], ids[~far & some])).sort().values
        chosen = chosen[:width]
        rows.append(torch.cat((chosen, torch.full((width - len(chosen),), -1))))
    return torch.stack(rows).view(len(lengths), heads, 1, width).to(torch.int32)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60)
@given(data=st.data(), pool=st.integers(1, 6), bits=st.sampled_from([(0, 0), (8, 8), (4, 8)]))
def test_the_pool_is_a_list_in_the_order_of_last_use(
    device: str, data: st.DataObject, pool: int, bits: tuple[int, int]
) -> None:
    if device == "cuda":
        need(device)
    case = Case(pool=pool, bits=bits, seed=data.draw(st.integers(0, 99)))
    scene, places = Scene(case, device), case.places
    used = [[(int(spot), -1) for spot in line] for line in scene.held[:, :, 0].flatten(0, 1)]
    hits = misses = 0
    for call in range(data.draw(st.integers(1, 5))):
        lengths = [data.draw(st.integers(0, 20 * places.block)) for _ in range(case.rows)]
        heads = data.draw(st.sampled_from([1, case.heads]))
        ids = draw_ids(case, heads, 12, lengths, call)
        expected, found = scene.stored(), ids.expand(-1, case.heads, -1, -1).clone()
        for line, held in enumerate(used):
            row, head = divmod(line, case.heads)
            asked = [int(j) for j in ids[row, head % heads, 0] if j >= 0]
            far = [j for j in asked if places.is_far(torch.tensor(j), torch.tensor(lengths[row]))]
            there = {block: spot for spot, block in held if block in far}
            idle = [pair for pair in held if pair[1] not in far]
            fresh = iter(idle)
            spots = {j: there[j] if j in there else next(fresh)[0] for j in far}
            used[line] = [*list(fresh), *((spots[j], j) for j in far)]
            hits, misses = hits + len(there), misses + len(far) - len(there)
            for j in (j for j in far if j not in there):
                segment, inside = divmod(j, case.segments[1])
                expected[row, head, places.sinks + places.tail + spots[j]] = scene.first[2].segments[segment][
                    row, head, inside
                ]
            pages = [
                places.sinks + places.tail + spots[j] if j in spots else int(places.page(torch.tensor(j)))
                for j in asked
            ]
            found[row, head, 0, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        got = scene.bring(ids, torch.tensor(lengths))
        assert got.dtype == torch.int32
        assert torch.equal(got.cpu(), found)
        assert torch.equal(scene.stored(), expected)
        assert scene.held.transpose(2, 3).flatten(0, 1).tolist() == [list(map(list, held)) for held in used]
        assert scene.counts.tolist() == [hits, misses]


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60)
@given(data=st.data(), out=st.booleans(), bits=st.sampled_from([(0, 0), (8, 8), (4, 8)]))
def test_a_run_of_blocks_is_copied_and_nothing_else(
    device: str, data: st.DataObject, out: bool, bits: tuple[int, int]
) -> None:
    if device == "cuda":
        need(device)
    case = Case(bits=bits, seed=data.draw(st.integers(0, 99)))
    scene, places = Scene(case, device), case.places
    alike = data.draw(st.booleans())
    first = torch.tensor([data.draw(st.integers(0, 18)) for _ in range(1 if alike else case.rows)])
    last = torch.tensor([data.draw(st.integers(int(j) - 1, int(j) + places.tail)) for j in first])
    stored, on_host = scene.stored(), scene.on_host()
    for row in range(case.rows):
        for j in range(int(first[row % len(first)]), int(last[row % len(last)])):
            page = int(places.page(torch.tensor(j)))
            if out:
                on_host[row, :, j] = stored[row, :, page]
            else:
                stored[row, :, page] = on_host[row, :, j]
    scene.copy(first, last, places.tail, out)
    assert torch.equal(scene.on_host(), on_host)
    assert torch.equal(scene.stored(), stored)


LARGE = [
    Case(1, 2, 1, ops.Places(16, 1, 3), (64, 64), segments=(2, 200), seed=1),
    Case(1, 2, 40, ops.Places(128, 1, 3), (128, 128), segments=(5, 32), seed=2),
    Case(3, 5, 40, ops.Places(32, 0, 2), (64, 128), (4, 8), torch.float16, (5, 100), seed=3),
    Case(1, 2, 1500, ops.Places(8, 200, 900), (8, 8), segments=(9, 512), seed=4),
    Case(2, 1, 4096, ops.Places(16, 2, 40), (16, 16), dtype=torch.float64, segments=(3, 2000), seed=5),
]


@pytest.mark.cuda
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_definition(case: Case) -> None:
    """Pools and choices of more blocks than a thread block has threads, and several segments."""
    need("cuda")
    mine, defined = Scene(case, "cuda"), Scene(case, CPU)
    tokens = case.segments[0] * case.segments[1] * case.places.block
    for call in range(6):
        lengths = [tokens - 31 * row * case.places.block - call for row in range(case.rows)]
        width = min(3000, tokens // case.places.block)
        ids = draw_ids(case, 1 if call % 2 else case.heads, width, lengths, call)
        got = mine.bring(ids, torch.tensor(lengths))
        with use_backend("reference"):
            expected = defined.bring(ids, torch.tensor(lengths))
        assert torch.equal(got.cpu(), expected)
        assert torch.equal(mine.held.cpu(), defined.held)
        assert torch.equal(mine.counts.cpu(), defined.counts)
        assert torch.equal(mine.stored(), defined.stored())
    assert int(defined.counts[0]) > 0 or case.pool == 1


@pytest.mark.cuda
def test_a_captured_call_follows_the_lengths_on_the_device() -> None:
    need("cuda")
    case = Case(pool=6, segments=(4, 8))
    recorded, stepped = Scene(case, "cuda"), Scene(case, "cuda")
    lengths, first = torch.tensor([40, 70], device="cuda"), torch.tensor([3, 6], device="cuda")
    ids = draw_ids(case, case.heads, 12, lengths.tolist(), 0).cuda()
    recorded.bring(ids, torch.zeros_like(lengths))  # nothing is far
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        places = recorded.bring(ids, lengths)
        recorded.copy(first, lengths // case.places.block, case.places.tail, True)
    for step in range(20):
        lengths += 8
        first += 1
        ids.copy_(draw_ids(case, case.heads, 12, lengths.tolist(), step))
        graph.replay()
        expected = stepped.bring(ids, lengths)
        stepped.copy(first, lengths // case.places.block, case.places.tail, True)
        assert torch.equal(places, expected)
    for mine, one_by_one in ((recorded.stored(), stepped.stored()), (recorded.on_host(), stepped.on_host())):
        assert torch.equal(mine, one_by_one)
    assert torch.equal(recorded.held, stepped.held)
    assert torch.equal(recorded.counts, stepped.counts)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("case", "changed", "reason"),
    [
        (Case(places=ops.Places(4, 1, 3), bits=(8, 8)), {}, "needs blocks of whole pieces of 16 bytes"),
        (Case(pool=4097, dims=(8, 8), segments=(1, 1)), {}, "takes a pool of at most 4096 blocks"),
        (Case(), {"table": None}, "needs host memory that the device reads by itself"),
    ],
    ids=["pieces", "pool", "files"],
)
def test_what_it_does_not_take_is_done_by_the_definition(case: Case, changed: dict[str, Any], reason: str) -> None:
    need("cuda")
    scene, same = Scene(case, "cuda"), Scene(case, CPU)
    k, v, host = scene.first
    host = replace(host, **changed)
    lengths = torch.tensor([5 * case.places.block] * case.rows)
    ids = torch.zeros(case.rows, 1, 1, 1, dtype=torch.int32)
    arguments = (k, v, host, ids.cuda(), lengths.cuda(), scene.held, scene.counts, case.places)
    assert reason in str(compiled.reject_bring(*arguments))
    assert torch.equal(ops.bring_blocks(*arguments).cpu(), same.bring(ids, lengths))
    assert torch.equal(scene.held.cpu(), same.held)


def test_the_library_moves_nothing_on_the_cpu() -> None:
    need(CPU)
    scene = Scene(Case(), CPU)
    ids, lengths = torch.zeros(2, 1, 1, 1, dtype=torch.int32), torch.tensor([50])
    reason = compiled.reject_bring(*scene.first, ids, lengths, scene.held, scene.counts, scene.case.places)
    assert reason == "moves blocks on CUDA only"
