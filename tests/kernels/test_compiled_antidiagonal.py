"""`score_antidiagonal` and `pick_blocks` with a share, of the compiled library on a GPU; what it leaves to others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_longctx.kernels import antidiagonals, dispatch, ops
from hf_longctx.kernels.compiled import antidiagonal, select
from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.kernels.reference import score

from .built import need

pytestmark = pytest.mark.usefixtures("poisoned")


@dataclass(frozen=True)
class Tiled:
    """What a call of `score_antidiagonal` is like.

    Args:
        heads: KV heads, and query heads of each.
        spans: of each row, where its queries begin and end; one: all rows are alike.
        block: tokens of a block, and of a tile.
        more: keys after the longest row.
        rows: of the batch.
        loud: factor of the queries.
    """

    heads: tuple[int, int] = (2, 4)
    spans: tuple[tuple[int, int], ...] = ((0, 700), (333, 1001))
    block: tuple[int, int] = (128, 16)
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    more: int = 5
    rows: int = 2
    loud: float = 2.0


BLOCKS = [(64, 4), (64, 8), (64, 16), (128, 4), (128, 8), (128, 16), (128, 32), (256, 4), (256, 8), (1024, 16)]
TILED = [
    *(Tiled(block=b, dtype=t) for b in BLOCKS for t in (torch.bfloat16, torch.float16)),
    *(
        Tiled(dim=d, block=b, causal=c)
        for d in (8, 64, 72, 96, 256)
        for b in ((64, 4), (128, 16))
        for c in (True, False)
    ),
    *(Tiled(heads=h) for h in ((1, 1), (3, 1), (1, 7), (2, 8))),
    *(Tiled(spans=((s, e),), causal=c) for s, e in ((0, 1), (17, 18), (128, 256), (5000, 5300)) for c in (True, False)),
    Tiled(spans=((0, 0), (100, 500))),
    Tiled(spans=((3000, 3100), (0, 90), (60, 2100)), rows=3, block=(128, 8)),
    Tiled(spans=((0, 700), (333, 1001)), causal=False, more=3),
    Tiled(spans=((0, 9000),), rows=1, heads=(1, 2), block=(128, 8), more=0),
    Tiled(spans=((20000, 24001),), rows=1, heads=(2, 4), block=(64, 4), more=0),
    Tiled(loud=40.0),
    # whole blocks, which are read where they lie
    *(
        Tiled(spans=((0, 1024),), dim=d, more=0, dtype=t)
        for d in (64, 128, 256)
        for t in (torch.bfloat16, torch.float16)
    ),
    *(
        Tiled(spans=((2048, 4096),), block=b, more=32, causal=c)
        for b in ((64, 4), (128, 8), (256, 32))
        for c in (True, False)
    ),
    Tiled(spans=((128, 384), (256, 512)), more=16),
    Tiled(spans=((128, 384), (256, 500)), more=12),
    Tiled(spans=((4096, 12288),), rows=1, heads=(2, 4), more=0),
]


def tiles(case: Tiled) -> tuple[Any, ...]:
    """Arguments; queries stand first in their blocks, NaN where there is none and in keys that nobody has."""
    (kv_heads, group), (block, stride) = case.heads, case.block
    count = max(-(-end // block) - start // block for start, end in case.spans)
    q_pos = torch.full((len(case.spans), count * block), -1)
    for row, (start, end) in enumerate(case.spans):
        for n in range(count):
            low = (start // block + n) * block
            own = torch.arange(max(start, low), max(min(end, low + block), max(start, low)))
            q_pos[row, n * block : n * block + len(own)] = own
    stored = max(end for _, end in case.spans) + case.more
    made = torch.Generator().manual_seed(stored)
    q = torch.randn(case.rows, count * block, kv_heads * group, case.dim, generator=made) * case.loud
    k = torch.randn(case.rows, kv_heads, stored + 3, case.dim, generator=made)
    q, k = q.to(case.dtype).transpose(1, 2), k.to(case.dtype)[:, :, :stored]
    q[(q_pos < 0)[:, None].expand(q.shape[:3])] = torch.nan
    if case.causal:
        after = torch.arange(stored) > q_pos.amax(1)[:, None]
        k[after[:, None].expand(k.shape[:3])] = torch.nan
    return q, k, q_pos, block, stride, case.dim**-0.5, case.causal


def on_cuda(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.cuda() if isinstance(x, Tensor) else x for x in arguments)


@pytest.mark.cuda
@pytest.mark.parametrize("case", TILED, ids=str)
def test_scores(case: Tiled) -> None:
    """A logit is off by a rounding of the largest sum of products for every 16 of them, a score by twice that part."""
    need("cuda")
    q, k, q_pos, block, stride, scale, causal = on_cuda(tiles(case))
    arguments = (q, k, q_pos, block, stride, scale, causal)
    assert antidiagonal.reject(*arguments) is None
    got = antidiagonal.score_antidiagonal(*arguments)
    assert torch.equal(got, antidiagonal.score_antidiagonal(*arguments))
    with use_backend("reference"):
        exact = ops.score_antidiagonal(q.double(), k.double(), *arguments[2:])
    assert got.shape == exact.shape
    lengths = [x.float().nan_to_num(0.0).norm(dim=-1).amax() for x in (q, k)]
    off = stride * case.dim / 16 * torch.finfo(torch.float32).eps * float(lengths[0] * lengths[1]) * scale
    assert bool(((got.double() - exact).abs() <= (2 * off + 1e-5) * exact + 1e-6).all())


SHORT = [case for case in TILED if max(end for _, end in case.spans) < 2000]


@pytest.mark.parametrize(
    ("case", "device"),
    [(case, "cpu") for case in SHORT[::4]] + [pytest.param(case, "cuda", marks=pytest.mark.cuda) for case in TILED],
    ids=str,
)
def test_scores_of_torch(case: Tiled, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far off as those of the library, a few blocks of queries at a time; keys of 8 bits, too."""
    arguments = tuple(x.to(device) if isinstance(x, Tensor) else x for x in tiles(case))
    q, k, _, _, stride, scale, _ = arguments
    if device == "cpu":
        monkeypatch.setattr(antidiagonals, "products", lambda a, b: a.double() @ b.double())
    else:
        assert antidiagonals.reject(*arguments) is None
    monkeypatch.setattr(antidiagonals, "LOGITS", 1 << 20)
    got = antidiagonals.score_antidiagonal(*arguments)
    with use_backend("reference"):
        exact = ops.score_antidiagonal(q.double(), k.double(), *arguments[2:])
    assert (got.dtype, got.shape) == (torch.float32, exact.shape)
    lengths = [x.float().nan_to_num(0.0).norm(dim=-1).amax() for x in (q, k)]
    off = stride * case.dim / 16 * torch.finfo(torch.float32).eps * float(lengths[0] * lengths[1]) * scale
    assert bool(((got.double() - exact).abs() <= (2 * off + 1e-5) * exact + 1e-6).all())
    packed = ops.encode_kv(k.nan_to_num(0.0), 8)
    read = antidiagonals.score_antidiagonal(q, packed, *arguments[2:])
    assert torch.equal(read, antidiagonals.score_antidiagonal(q, ops.decode_kv(packed), *arguments[2:]))


@pytest.mark.cuda
def test_torch_sums_up_where_there_is_no_library() -> None:
    arguments = on_cuda(tiles(Tiled()))
    with use_backend("torch"):
        ops.score_antidiagonal(*arguments)
        with pytest.raises(dispatch.UnsupportedError, match="torch: rounds nothing to 8 bits"):
            ops.score_antidiagonal(*arguments, "int8")
    assert dispatch.last_used()["score_antidiagonal"] == "torch"


def defined(arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, float]:
    """Scores as they are defined, in float64, and the largest sum that was made for them."""
    largest, shares = [0.0], score.shares_of

    def seen(x: Tensor, tile: Tensor, causal: bool) -> Tensor:
        largest.append(float(x.abs().amax()))
        return shares(x, tile, causal)

    monkeypatch.setattr(score, "shares_of", seen)
    q, k, *rest = arguments
    with use_backend("reference"):
        return ops.score_antidiagonal(q.double(), k.double(), *rest), max(largest)


def need_eight() -> None:
    need("cuda")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("tiles of 8 bits are multiplied on sm_90 alone")


@pytest.mark.cuda
@pytest.mark.parametrize("rounded", ["fp8", "int8"])
@pytest.mark.parametrize("case", TILED, ids=str)
def test_scores_of_eight_bits(case: Tiled, rounded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded as defined. Sums of whole numbers are exact; those of 32 floats are cut off 13 bits below the largest.

    A few of them more than there are stand for products that are larger than any sum.
    """
    need_eight()
    arguments = (*on_cuda(tiles(case)), rounded)
    stride = arguments[4]
    assert antidiagonal.reject(*arguments) is None
    got = antidiagonal.score_antidiagonal(*arguments)
    assert torch.equal(got, antidiagonal.score_antidiagonal(*arguments))
    exact, largest = defined(arguments, monkeypatch)
    cut = (stride * case.dim / 32 + 8) * 2.0**-13 if rounded == "fp8" else 8 * torch.finfo(torch.float32).eps
    off = cut * largest
    assert bool(((got.double() - exact).abs() <= (2 * off + 1e-4) * exact + 1e-6).all())


@pytest.mark.cuda
@pytest.mark.parametrize(("rounded", "least"), [("fp8", 0.99), ("int8", 0.995)])
def test_eight_bits_lose_few_blocks(rounded: str, least: float) -> None:
    """Of the choice of full precision, on texts in which blocks of one topic pay attention to each other."""
    need_eight()
    q, k, q_pos, *rest = on_cuda(tiles(Tiled(heads=(2, 4), spans=((0, 8192),), rows=1, loud=1.0, more=0)))
    made = torch.Generator("cuda").manual_seed(0)
    ways = torch.randn(8, 128, device="cuda", generator=made, dtype=torch.bfloat16)
    own = ways[torch.randint(8, (64,), device="cuda", generator=made)].repeat_interleave(128, 0)
    at = torch.arange(64, device="cuda")[None]
    tau = torch.full((8,), 0.9, device="cuda")
    chosen, all_scores = [], []
    for to in ("", rounded):
        scores = antidiagonal.score_antidiagonal(q + own, k + own, q_pos, *rest, to)
        ids = select.pick_blocks(scores, at, at, 1, None, tau, 1).long()
        chosen.append(torch.zeros(*ids.shape[:3], 65, device="cuda").scatter_(3, ids % 65, 1.0)[..., :64] > 0)
        all_scores.append(scores)
    assert not torch.equal(*all_scores)
    both, either = chosen[0] & chosen[1], chosen[0] | chosen[1]
    assert float(both.sum() / either.sum()) >= least


@pytest.mark.cuda
@pytest.mark.parametrize("rounded", ["", "fp8", "int8"])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_a_query_that_is_no_number_spoils_the_scores_of_its_block(odd: float, rounded: str) -> None:
    need_eight() if rounded else need("cuda")
    q, k, q_pos, *rest = (*on_cuda(tiles(Tiled(spans=((0, 600),)))), rounded)
    clean = antidiagonal.score_antidiagonal(q, k, q_pos, *rest)
    q[1, 3, 300] = odd
    got = antidiagonal.score_antidiagonal(q, k, q_pos, *rest)
    assert got[1, 3, 2, :3].isnan().all()
    got[1, 3, 2], clean[1, 3, 2] = 0.0, 0.0
    assert torch.equal(got, clean)


@pytest.mark.cuda
@pytest.mark.parametrize("rounded", ["", "fp8", "int8"])
def test_parts_of_a_long_call_are_those_of_short_ones(rounded: str) -> None:
    """So many queries that their sums, of 256 MiB, are made in parts: one for every 12,800 of them."""
    need_eight() if rounded else need("cuda")
    case = Tiled(heads=(2, 4), spans=((0, 40960),), block=(16, 4), dim=64, rows=1, more=0)
    q, k, q_pos, *rest = (*on_cuda(tiles(case)), rounded)
    got = antidiagonal.score_antidiagonal(q, k, q_pos, *rest)
    for start in (0, 12784, 12800, 40944):
        part = slice(start, start + 16)
        alone = antidiagonal.score_antidiagonal(q[:, :, part], k, q_pos[:, part], *rest)
        torch.testing.assert_close(got[:, :, start // 16 : start // 16 + 1], alone, rtol=0, atol=0)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dtype": torch.float32}, "float16 or bfloat16"),
    ({"dim": 264}, "at most 256"),
    ({"dim": 12}, "a multiple of 8 channels"),
    ({"block": (32, 16)}, "blocks of 4, 8, 16, 32 or 64 strides"),
    ({"block": (96, 8)}, "blocks of 4, 8, 16, 32 or 64 strides"),
    ({"block": (64, 2)}, "strides of 4, 8, 16 or 32"),
]


@pytest.mark.cuda
@pytest.mark.parametrize(("changed", "reason"), REFUSED)
def test_what_it_does_not_score(changed: dict[str, Any], reason: str) -> None:
    need("cuda")
    assert reason in str(antidiagonal.reject(*on_cuda(tiles(Tiled(spans=((0, 200),), **changed)))))


@pytest.mark.cuda
def test_packed_keys_and_devices_that_it_does_not_score() -> None:
    need("cuda")
    q, k, *rest = on_cuda(tiles(Tiled(spans=((0, 200),))))
    assert "not packed" in str(antidiagonal.reject(q, ops.encode_kv(k, 8), *rest))
    assert "one device" in str(antidiagonal.reject(q, k.cpu(), *rest))


def test_the_cpu_is_left_to_others() -> None:
    need("cpu")
    assert "on CUDA only" in str(antidiagonal.reject(*tiles(Tiled(spans=((0, 200),)))))


@dataclass(frozen=True)
class Massed:
    """What a call of `pick_blocks` with a share is like.

    Args:
        sizes: rows, heads, queries, blocks.
        kind: how scores are spread: `softmax`, `steep`, `few` values (whose sums are exact), `same`, `zeros`, `odd`.
        tau: of the heads.
        local: forced blocks up to the last query's.
    """

    sizes: tuple[int, int, int, int] = (2, 3, 5, 100)
    kind: str = "softmax"
    tau: tuple[float, ...] = (0.5, 0.9, 1.0)
    local: int = 2
    sink: int = 1


KINDS = ["softmax", "steep", "few", "same", "zeros", "odd"]
MASSED = [
    *(Massed((2, 3, 5, m), kind) for m in (1, 2, 100, 257, 1024) for kind in KINDS),
    *(Massed((1, 3, 2, 20000), kind) for kind in KINDS),
    *(Massed(sink=s, local=n) for s in (0, 1, 40) for n in (1, 3, 200)),
    *(Massed((1, 3, 4, 300), "few", (t, 0.25, 0.75)) for t in (1e-6, 0.01, 0.5, 0.999999, 1.0)),
]


def masses(case: Massed) -> tuple[Any, ...]:
    """Arguments; the last query of a row is in its last block, those before it in earlier ones, the first nowhere."""
    rows, _, count, blocks = case.sizes
    made = torch.Generator().manual_seed(blocks)
    scores = torch.randn(case.sizes, generator=made)
    if case.kind in ("softmax", "steep"):
        scores = 8 * (scores * (1 if case.kind == "softmax" else 6)).softmax(-1)
    elif case.kind == "few":
        scores = (scores * 8).abs().round() / 16
    elif case.kind == "odd":
        scores = scores.abs()
        scores[:, 0, :, ::7], scores[:, 1, :, 3:4], scores[:, 2, -1] = torch.nan, torch.inf, torch.nan
    else:
        scores = torch.full(case.sizes, 0.0 if case.kind == "zeros" else 0.25)
    high = (torch.arange(count) * blocks // max(1, count - 1)).clamp(max=blocks - 1).expand(rows, -1).clone()
    high[:, 0] = -1 if count > 1 else blocks - 1
    low = (high - case.local + 1).clamp(min=0)
    return scores, low, high, case.sink, None, torch.tensor(case.tau), case.local


@pytest.mark.cuda
@pytest.mark.parametrize("case", MASSED, ids=str)
def test_picks(case: Massed) -> None:
    """Exactly those of the definition in float64."""
    need("cuda")
    arguments = masses(case)
    moved = on_cuda(arguments)
    assert select.reject_pick(*moved) is None
    got = select.pick_blocks(*moved)
    with use_backend("reference"):
        expected = ops.pick_blocks(arguments[0].double(), *arguments[1:])
    assert got.dtype == expected.dtype
    assert torch.equal(got.cpu(), expected)
    assert torch.equal(got, select.pick_blocks(*moved))


def check_captured(score: Callable[..., Tensor], pick: Callable[..., Tensor]) -> None:
    """Queries and positions lie in the same memory; what they are may change."""
    q, *rest = on_cuda(tiles(Tiled(spans=((0, 512),), more=0)))
    low = torch.arange(4, device="cuda")[None]
    tau = torch.full((q.shape[1],), 0.7, device="cuda")

    def choose() -> Tensor:
        return pick(score(q, *rest), low, low, 0, None, tau, 1)

    choose()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = choose()
    seen = []
    for _ in range(2):
        q.neg_()
        graph.replay()
        seen.append(ids.clone())
        assert torch.equal(ids, choose())
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.cuda
def test_captured_calls_choose_anew() -> None:
    need("cuda")
    check_captured(antidiagonal.score_antidiagonal, select.pick_blocks)
