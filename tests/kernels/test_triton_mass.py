"""`attend_mass` in Triton against the definition: on the CPU in its interpreter and, marked `cuda`, on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_longctx.kernels import dispatch, ops, triton
from hf_longctx.kernels.dispatch import use_backend

from .prefills import Case, made
from .test_triton import exactly, finite, nan_filled, need

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
BASE = Case((1, 1, 2, 40, 100, 16), F16, lists=(32, 40, "some"), share="kv_head")
FAR = replace(BASE, lap=50, clamp=30, rotated=16, lists=(16, 40, "all"))
"""Keys that are far to all queries, to some, of two laps, and seen by some."""
CASES = [
    *((replace(BASE, sizes=(1, 1, 2, 40, 100, d), dtype=t), 30) for d in (10, 40) for t in (F16, F32)),
    *((replace(BASE, lists=(32, 40, kind)), near) for kind, near in (("all", 1), ("one", 30), ("own", 200))),
    *((replace(BASE, lists=(block, 20, "some"), sizes=(2, 2, g, 40, 90, 16)), 25) for block, g in ((16, 1), (48, 3))),
    *((replace(BASE, share=share, pages=True, sizes=(1, 2, 2, 20, 75, 16)), 30) for share in ("all", "kv_head")),
    (replace(BASE, ends=(99, -1, 30), sizes=(3, 1, 2, 33, 100, 16)), 30),
    (replace(BASE, sizes=(2, 1, 4, 1, 100, 16), lists=(16, 1, "all"), ends=(99, 40)), 30),
    (replace(BASE, sizes=(1, 1, 4, 3, 100, 16), lists=(16, 1, "all"), sink_logits=True), 30),
    (replace(BASE, softcap=3.0, sink_logits=True, slopes=True, lists=(32, 40, "all")), 30),
    *((replace(BASE, bits=b, dtype=t, pages=True), 30) for b, t in ((8, F16), (4, F32))),
    (replace(FAR, dtype=F32), 31),
    (replace(FAR, dtype=F32, sizes=(2, 2, 2, 40, 130, 24), pages=True, share="all", interleaved=True), 31),
    (replace(FAR, dtype=F32, lists=(32, 10, "all"), sink_logits=True), 60),
    *((replace(FAR, bits=b, sizes=(2, 1, 2, 30, 110, 16), ends=(109, 60)), 31) for b in (8, 4)),
    (replace(FAR, sizes=(1, 1, 4, 1, 100, 16), lists=(16, 1, "all"), dtype=F32), 31),
    (replace(FAR, rotated=0, slopes=True), 31),
    (replace(FAR, slopes=True, softcap=3.0, dtype=F32), 31),
]
LARGE = [
    *(
        (replace(case, sizes=(2, 2, g, 300, 1500, d), dtype=t, pages=pages), 401)
        for case in (
            replace(BASE, lists=(128, 300, "some")),
            replace(BASE, lists=(64, 130, "all"), bits=4),
            replace(FAR, lists=(128, 300, "all"), lap=700, clamp=400, rotated=64),
            replace(FAR, lists=(128, 130, "some"), lap=410, clamp=400, rotated=32, bits=8, sink_logits=True),
        )
        for g, d, t, pages in ((4, 128, BF16, True), (1, 64, F16, False), (2, 256, BF16, False), (2, 96, F32, True))
    ),
    *(
        (replace(FAR, sizes=(1, 8, 4, t, 1500, 128), dtype=BF16, lists=(128, t, "all"), lap=700, clamp=400), 401)
        for t in (1, 5, 17)
    ),
    (replace(FAR, sizes=(1, 1, 4, 100, 900, 128), dtype=BF16, lists=(128, 100, "all"), lap=700, clamp=200), 500),
]
BOTH = [(*case, "cpu") for case in CASES] + [
    pytest.param(*case, "cuda", marks=pytest.mark.cuda) for case in (*CASES, *LARGE)
]


@pytest.mark.parametrize(("case", "near", "device"), BOTH, ids=str)
def test_attend_mass(case: Case, near: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of what comes out are at most twice those of the definition in the same dtype, and 2 ulp.

    Shares of keys as they are decoded are as far off as logits: where queries and keys are turned, each is rounded once
    more, which changes a product by less than an ulp of both lengths; and sums of float32 are of so many terms.
    """
    need(device)
    arguments = made(case, device)
    q, k, v = arguments[0], *map(finite, arguments[1:3])
    with use_backend("reference"):
        exact, _ = ops.attend_mass(*map(exactly, (q, k, v)), *arguments[3:], near)
        decoded = k if isinstance(k, torch.Tensor) else ops.decode_kv(k)
        _, exact_mass = ops.attend_mass(q.double(), decoded.double(), decoded.double(), *arguments[3:], near)
        same, _ = ops.attend_mass(q, k, v, *arguments[3:], near)
    got, mass = run(arguments, near, monkeypatch)
    assert (got.dtype, mass.dtype) == (q.dtype, F32)
    ulp = torch.finfo(q.dtype).eps * float(exact.abs().max())
    yardstick = float((same.double() - exact).abs().max())
    assert float((got.double() - exact).abs().max()) <= 2 * yardstick + 2 * ulp
    assert not got[exact.eq(0).all(-1)].any()
    lengths = [x.double().norm(dim=-1).amax() for x in (q, decoded)]
    turned = case.clamp is not None and case.rotated > 0
    eps = torch.finfo(q.dtype if turned else F32).eps
    off = (eps + q.shape[3] * torch.finfo(F32).eps) * float(lengths[0] * lengths[1]) * arguments[3].scale
    assert bool(((mass - exact_mass).abs() <= (2 * off + 1e-4) * exact_mass + 1e-6).all())
    assert not mass[exact_mass.eq(0)].any()


def run(arguments: tuple[Any, ...], near: int, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    """In Triton, the same twice; what is not written is NaN."""
    with use_backend("triton"):
        dispatch.chosen("attend_mass", *arguments, near)
        monkeypatch.setattr(triton._module("attend_mass"), "empty_out", nan_filled)
        found = ops.attend_mass(*arguments, near)
        if arguments[0].is_cuda:
            assert all(map(torch.equal, found, ops.attend_mass(*arguments, near)))
    assert dispatch.last_used()["attend_mass"] == "triton"
    return found


def test_lists_that_are_turned_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    need("cpu")
    arguments = made(replace(FAR, lists=(16, 15, "some"), pages=True), "cpu")
    run(arguments, 31, monkeypatch)
    monkeypatch.setattr(triton._module("attend_mass"), "splits_of", lambda *sizes: 1)
    whole = run(arguments, 31, monkeypatch)
    monkeypatch.setattr(triton._module("attend_mass"), "TURNED", 1)
    assert all(map(torch.equal, run(arguments, 31, monkeypatch), whole))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dtype": torch.float64}, "needs queries, keys and values in one dtype"),
    ({"dtype": BF16}, "has no bfloat16 in Triton's interpreter"),
    ({"sizes": (1, 1, 1, 9, 9, 300)}, "takes at most 256 channels"),
    ({"lists": (8, 40, "some")}, "takes blocks of a multiple of 16 keys"),
    ({"lap": 300}, "turns queries to keys at clamped distances only"),
]


@pytest.mark.parametrize(("changed", "reason"), REFUSED)
def test_what_it_does_not_take(changed: dict[str, Any], reason: str) -> None:
    need("cpu")
    arguments = made(replace(BASE, **changed), "cpu")
    with use_backend("triton"), pytest.raises(dispatch.UnsupportedError, match=f"attend_mass: .*triton: {reason}"):
        ops.attend_mass(*arguments, 30)
