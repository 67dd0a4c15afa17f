"""The choice of blocks in Triton against the definition: on the CPU in its interpreter and, marked `cuda`, on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_longctx.kernels import dispatch, ops, triton
from hf_longctx.kernels.dispatch import use_backend

from . import test_compiled_antidiagonal as antidiagonals
from . import test_compiled_select as selects
from .test_compiled_antidiagonal import Massed, Tiled, masses, on_cuda, tiles
from .test_compiled_select import Picked, scores_of
from .test_triton import need

F16, F32 = torch.float16, torch.float32
SMALL = Tiled(heads=(2, 2), spans=((0, 150), (70, 201)), block=(32, 4), dim=16, dtype=F16)
TINY = replace(SMALL, heads=(1, 2), spans=((0, 100),), rows=1)
TILED = [
    *(replace(SMALL, block=b) for b in ((16, 16), (32, 8), (64, 1), (96, 12))),
    *(replace(SMALL, dim=d, causal=c) for d, c in ((10, True), (10, False), (40, True))),
    *(replace(SMALL, heads=h) for h in ((1, 1), (3, 1), (1, 7))),
    *(replace(SMALL, spans=((s, e),), causal=c) for s, e in ((0, 1), (17, 18), (600, 650)) for c in (True, False)),
    replace(SMALL, spans=((0, 0), (30, 150))),
    replace(SMALL, spans=((600, 640), (0, 30), (60, 300)), rows=3),
    replace(SMALL, spans=((0, 1100),), rows=1, heads=(1, 2), block=(32, 2), more=0),
    replace(SMALL, loud=40.0),
]


def check_scores(arguments: tuple[Any, ...]) -> None:
    """A logit is off by a rounding of the largest sum of products for every 16 of them, a score by twice that part."""
    q, k, _, _, stride, scale, _ = arguments
    with use_backend("triton"):
        got = ops.score_antidiagonal(*arguments)
        assert not q.is_cuda or torch.equal(got, ops.score_antidiagonal(*arguments))
    assert dispatch.last_used()["score_antidiagonal"] == "triton"
    with use_backend("reference"):
        exact = ops.score_antidiagonal(q.double(), k.double(), *arguments[2:])
    assert (got.dtype, got.shape) == (F32, exact.shape)
    lengths = [x.float().nan_to_num(0.0).norm(dim=-1).amax() for x in (q, k)]
    off = stride * q.shape[3] / 16 * torch.finfo(F32).eps * float(lengths[0] * lengths[1]) * scale
    assert bool(((got.double() - exact).abs() <= (2 * off + 1e-5) * exact + 1e-6).all())


@pytest.mark.parametrize("case", TILED, ids=str)
def test_scores(case: Tiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """One strip of tiles at a time."""
    need("cpu")
    with use_backend("triton"):
        dispatch.chosen("score_antidiagonal", *tiles(case))
    monkeypatch.setattr(triton._module("score_antidiagonal"), "SUMS", 1)
    check_scores(tiles(case))


@pytest.mark.parametrize(
    ("case", "device"),
    [(SMALL, "cpu"), *(pytest.param(case, "cuda", marks=pytest.mark.cuda) for case in antidiagonals.TILED[::9])],
    ids=str,
)
def test_scores_of_the_other_way_to_read_tiles(case: Tiled, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the device itself in the interpreter, row by row on a GPU that can do that."""
    need(device)
    arguments = tiles(case) if device == "cpu" else on_cuda(tiles(case))
    with use_backend("triton"):
        dispatch.chosen("score_antidiagonal", *arguments)
    monkeypatch.setattr(triton._module("score_antidiagonal"), "LARGE", 0 if device == "cpu" else 1 << 30)
    check_scores(arguments)


@pytest.mark.cuda
@pytest.mark.parametrize("case", [*TILED, *antidiagonals.TILED], ids=str)
def test_scores_on_a_gpu(case: Tiled) -> None:
    need("cuda")
    check_scores(on_cuda(tiles(case)))


EIGHTS = [
    SMALL,
    replace(TINY, dim=10),
    replace(TINY, dim=64, block=(64, 16)),
    replace(TINY, dim=128, block=(12, 3), causal=False),
    replace(SMALL, spans=((600, 640), (0, 30), (60, 130)), rows=3, heads=(1, 3), loud=40.0),
]


def round_more_at_a_time(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """In the interpreter, which runs one program after the other."""
    if device == "cpu":
        with use_backend("triton"):
            dispatch.chosen("score_antidiagonal", *tiles(TINY))
        monkeypatch.setattr(triton._module("text_tiles"), "EACH", 32)


def check_eight(arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded as defined. Sums of whole numbers are exact, of floats so on a CPU; a GPU cuts them off (as `cut` says).

    It cuts sums of 32 floats 13 bits below the largest, and a few more stand for products larger than any sum.
    """
    q, _, _, _, stride, *_, rounded = arguments
    with use_backend("triton"):
        got = ops.score_antidiagonal(*arguments)
        assert not q.is_cuda or torch.equal(got, ops.score_antidiagonal(*arguments))
    assert dispatch.last_used()["score_antidiagonal"] == "triton"
    exact, largest = antidiagonals.defined(arguments, monkeypatch)
    assert (got.dtype, got.shape) == (F32, exact.shape)
    cut = (stride * q.shape[3] / 32 + 8) * 2.0**-13 if rounded == "fp8" and q.is_cuda else 16 * torch.finfo(F32).eps
    off = cut * largest
    assert bool(((got.double() - exact).abs() <= (2 * off + 1e-5) * exact + 1e-6).all())


@pytest.mark.parametrize("rounded", ["fp8", "int8"])
@pytest.mark.parametrize(
    ("case", "device"),
    [(case, "cpu") for case in EIGHTS]
    + [pytest.param(case, "cuda", marks=pytest.mark.cuda) for case in (*EIGHTS, *antidiagonals.TILED[::3])],
    ids=str,
)
def test_scores_of_eight_bits(case: Tiled, device: str, rounded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need(device)
    round_more_at_a_time(monkeypatch, device)
    arguments = tiles(case) if device == "cpu" else on_cuda(tiles(case))
    check_eight((*arguments, rounded), monkeypatch)


@pytest.mark.cuda
@pytest.mark.parametrize("rounded", ["fp8", "int8"])
def test_scores_of_eight_bits_read_row_by_row(rounded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs that do not copy tiles by themselves."""
    need("cuda")
    with use_backend("triton"):
        dispatch.chosen("score_antidiagonal", *on_cuda(tiles(Tiled())))
    monkeypatch.setattr(triton._module("score_antidiagonal"), "LARGE", 1 << 30)
    check_eight((*on_cuda(tiles(Tiled())), rounded), monkeypatch)


@pytest.mark.parametrize("rounded", ["fp8", "int8"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_eight_bits_lose_few_blocks(rounded: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the choice of full precision, on texts in which blocks of one topic pay attention to each other."""
    need(device)
    round_more_at_a_time(monkeypatch, device)
    case = Tiled(heads=(2, 4), spans=((0, 8192),), rows=1, loud=1.0, more=0)
    if device == "cpu":
        case = replace(case, heads=(1, 2), spans=((0, 768),), block=(32, 8), dim=64, dtype=F16)
    q, k, q_pos, *rest = (x.to(device) if isinstance(x, Tensor) else x for x in tiles(case))
    made, blocks = torch.Generator().manual_seed(0), q.shape[2] // case.block[0]
    ways = torch.randn(8, case.dim, generator=made).to(q)
    own = ways[torch.randint(8, (blocks,), generator=made).to(device)].repeat_interleave(case.block[0], 0)
    at, tau = torch.arange(blocks, device=device)[None], torch.full((q.shape[1],), 0.9, device=device)
    chosen, all_scores = [], []
    for to in ("", rounded):
        with use_backend("triton"):
            all_scores.append(ops.score_antidiagonal(q + own, k + own, q_pos, *rest, to))
            ids = ops.pick_blocks(all_scores[-1], at, at, 1, None, tau, 1).long()
        marks = torch.zeros(*ids.shape[:3], blocks + 1, device=device)
        chosen.append(marks.scatter_(3, ids % (blocks + 1), 1.0)[..., :blocks] > 0)
    assert not torch.equal(*all_scores)
    both, either = chosen[0] & chosen[1], chosen[0] | chosen[1]
    assert float(both.sum() / either.sum()) >= 0.99


@pytest.mark.parametrize("rounded", ["", "fp8", "int8"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_packed_keys_are_read_as_they_are_decoded(bits: int, device: str, rounded: str) -> None:
    need(device)
    q, k, *rest = (x.to(device) if isinstance(x, Tensor) else x for x in tiles(TINY))
    packed = ops.encode_kv(k.nan_to_num(0.0), bits)
    with use_backend("triton"):
        got = ops.score_antidiagonal(q, packed, *rest, rounded)
        decoded = ops.score_antidiagonal(q, reference_of(packed), *rest, rounded)
    assert torch.equal(got, decoded)


def reference_of(packed: ops.Packed) -> Tensor:
    with use_backend("reference"):
        return ops.decode_kv(packed)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
@pytest.mark.parametrize("rounded", ["", "fp8", "int8"])
def test_a_query_that_is_no_number_spoils_the_scores_of_its_block(odd: float, device: str, rounded: str) -> None:
    need(device)
    q, k, q_pos, *rest = (x.to(device) if isinstance(x, Tensor) else x for x in tiles(TINY))
    with use_backend("triton"):
        clean = ops.score_antidiagonal(q, k, q_pos, *rest, rounded)
        q[0, 1, 70] = odd
        got = ops.score_antidiagonal(q, k, q_pos, *rest, rounded)
    assert got[0, 1, 2, :3].isnan().all()
    got[0, 1, 2], clean[0, 1, 2] = 0.0, 0.0
    assert torch.equal(got, clean)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dtype": F32}, "float16 or bfloat16"),
    ({"dtype": torch.bfloat16}, "no bfloat16 in Triton's interpreter"),
    ({"dim": 264}, "at most 256 channels"),
    ({"block": (96, 8)}, "takes blocks of 1, 2, 4, 8, 16, 32 or 64 strides"),
    ({"block": (256, 2)}, "takes blocks of 1, 2, 4, 8, 16, 32 or 64 strides"),
]


@pytest.mark.parametrize(("changed", "reason"), REFUSED)
def test_what_it_does_not_score(changed: dict[str, Any], reason: str) -> None:
    need("cpu")
    arguments = tiles(replace(SMALL, **changed))
    with use_backend("triton"), pytest.raises(dispatch.UnsupportedError, match=reason):
        ops.score_antidiagonal(*arguments)


def test_scores_that_are_for_others() -> None:
    need("cpu")
    arguments = tiles(SMALL)
    with use_backend("triton"):
        with pytest.raises(dispatch.UnsupportedError, match="triton: rounds tiles of at most 65536 numbers"):
            ops.score_antidiagonal(*tiles(replace(TINY, block=(8192, 8192))), "int8")
        with pytest.raises(dispatch.UnsupportedError, match="triton: needs channels that lie side by side"):
            ops.score_antidiagonal(arguments[0], arguments[1].mT.contiguous().mT, *arguments[2:])


def check_picks(arguments: tuple[Any, ...], device: str) -> None:
    need(device)
    moved = [x.to(device) if isinstance(x, Tensor) else x for x in arguments]
    with use_backend("triton"):
        got = ops.pick_blocks(*moved)
        assert device == "cpu" or torch.equal(got, ops.pick_blocks(*moved))
    assert dispatch.last_used()["pick_blocks"] == "triton"
    exact = arguments[0].double() if arguments[4] is None else arguments[0]
    with use_backend("reference"):
        expected = ops.pick_blocks(exact, *arguments[1:])
    assert got.dtype == expected.dtype
    assert torch.equal(got.cpu(), expected)


PICKED = [case for case in selects.PICKED if case.sizes[-1] <= 500][::2]
MASSED = [case for case in antidiagonals.MASSED if case.sizes[-1] <= 300][::3]


@pytest.mark.parametrize(
    ("case", "device"),
    [(case, "cpu") for case in PICKED]
    + [pytest.param(case, "cuda", marks=pytest.mark.cuda) for case in selects.PICKED],
    ids=str,
)
def test_the_best(case: Picked, device: str) -> None:
    check_picks(scores_of(case), device)


@pytest.mark.parametrize(
    ("case", "device"),
    [(case, "cpu") for case in MASSED]
    + [pytest.param(case, "cuda", marks=pytest.mark.cuda) for case in antidiagonals.MASSED],
    ids=str,
)
def test_a_share(case: Massed, device: str) -> None:
    """Exactly that of the definition in float64."""
    check_picks(masses(case), device)


@pytest.mark.parametrize("kind", ["any", "few", "odd"])
def test_rows_that_are_read_in_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need("cpu")
    with use_backend("triton"):
        dispatch.chosen("pick_blocks", *scores_of(Picked()))
    for name, size in (("WHOLE", 1), ("PART", 16)):
        monkeypatch.setattr(triton._module("pick_blocks"), name, size)
    check_picks(scores_of(Picked((1, 1, 1, 100), kind, (80,))), "cpu")
    check_picks(masses(Massed((1, 3, 1, 50), "softmax" if kind == "any" else kind)), "cpu")


@pytest.mark.parametrize(
    ("case", "device"),
    [(SMALL, "cpu")]
    + [pytest.param(case, "cuda", marks=pytest.mark.cuda) for case in (Tiled(), Tiled(spans=((4096, 12288),), rows=1))],
    ids=str,
)
def test_the_choice_is_that_of_the_definition(case: Tiled, device: str) -> None:
    """Of scores in float64, where no two of them are equal."""
    need(device)
    q, k, q_pos, block, *rest = (x.to(device) if isinstance(x, Tensor) else x for x in tiles(case))
    own = q_pos.view(len(q_pos), -1, block).amax(2)
    own = torch.where(own < 0, -1, own // block)
    tau = torch.linspace(0.3, 0.95, q.shape[1], device=device)

    def choose(q: Tensor, k: Tensor) -> Tensor:
        scores = ops.score_antidiagonal(q, k, q_pos, block, *rest)
        return ops.pick_blocks(scores, own.clamp(min=0), own, 1, None, tau, 1)

    with use_backend("triton"):
        got = choose(q, k)
    with use_backend("reference"):
        assert torch.equal(got, choose(q.double(), k.double()))
    assert bool((got[..., 2:] >= 0).any())


def test_scores_that_it_does_not_pick_out_of() -> None:
    need("cpu")
    scores, *rest = scores_of(Picked())
    with use_backend("triton"), pytest.raises(dispatch.UnsupportedError, match="triton: needs scores in float32"):
        ops.pick_blocks(scores.double(), *rest)
    with use_backend("triton"), pytest.raises(dispatch.UnsupportedError, match="triton: takes no empty tensors"):
        ops.pick_blocks(scores[:0], *rest)


@pytest.mark.cuda
def test_captured_calls_choose_anew() -> None:
    need("cuda")
    with use_backend("triton"):
        antidiagonals.check_captured(ops.score_antidiagonal, ops.pick_blocks)
