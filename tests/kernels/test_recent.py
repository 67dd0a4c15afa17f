"""`attend_recent` against a literal loop in float64, and the compiled library against the definition on a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_longctx.kernels import ops
from hf_longctx.kernels.compiled import recent
from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.kernels.ops import Logits, Visibility

from .built import need


def literal(
    q: Tensor, far: Any, near: Any, logits: Logits, q_pos: Any, far_pos: Any, near_pos: Any, recent: int
) -> Any:
    """Query by query, key by key."""
    out = torch.zeros(*q.shape[:3], far[1].shape[3], dtype=torch.float64)
    per = q.shape[1] // far[0].shape[1]
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            for t in range(q.shape[2]):
                at, read = int(q_pos[row][t]), []
                for (k, v), places, close in ((far, far_pos, False), (near, near_pos, True)):
                    for s in range(k.shape[2]):
                        place = int(places[row][s])
                        if 0 <= place <= at and (at - place < recent) == close:
                            x = logits.scale * float(q[row, head, t].double() @ k[row, head // per, s].double())
                            if logits.softcap:
                                x = logits.softcap * math.tanh(x / logits.softcap)
                            if logits.slopes is not None:
                                x += float(logits.slopes[head]) * (place - at)
                            read.append((math.exp(x), v[row, head // per, s].double()))
                sink = 0.0 if logits.sink_logits is None else math.exp(float(logits.sink_logits[head]))
                if read:
                    total = sink + sum(weight for weight, _ in read)
                    out[row, head, t] = sum(weight * value for weight, value in read) / total
    return out


def drawn(
    made: torch.Generator, rows: int, heads: int, tokens: int, stored: int, dim: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, tuple[Any, Any], tuple[Tensor, Tensor]]:
    """Queries, keys and values of few bits, and the same as they were."""

    def values(count: int, size: int) -> Tensor:
        return torch.randn(rows, count, size, dim, generator=made).to(device, dtype)

    k, v = values(heads, stored), values(heads, stored)
    return values(3 * heads, tokens), (ops.encode_kv(k, 4), ops.encode_kv(v, 4)), (k, v)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("recent", [1, 5, 40])
@pytest.mark.parametrize("tokens", [1, 23])
def test_definition_in_order(tokens: int, recent: int, backend: str) -> None:
    q, far, near = drawn(torch.Generator().manual_seed(tokens), 2, 2, tokens, 23, 8, torch.float32, "cpu")
    logits, places = Logits(8**-0.5), torch.arange(23).expand(2, -1)
    with use_backend(backend):
        got = ops.attend_recent(q, *far, *near, logits, Visibility(), None, recent)
    plain = tuple(ops.decode_kv(x) for x in far)
    expected = literal(q, plain, near, logits, places[:, 23 - tokens :], places, places, recent)
    torch.testing.assert_close(got, expected.float(), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kind", ["softcap", "sinks", "slopes", "plain"])
def test_definition_out_of_order(kind: str) -> None:
    made = torch.Generator().manual_seed(3)
    q, far, near = drawn(made, 2, 2, 3, 20, 8, torch.float32, "cpu")
    more: dict[str, Any] = {
        "softcap": {"softcap": 2.0},
        "sinks": {"sink_logits": torch.randn(6, generator=made)},
        "slopes": {"slopes": torch.rand(6, generator=made)},
        "plain": {},
    }[kind]
    logits = Logits(8**-0.5, **more)
    far_pos = torch.stack((torch.randperm(20, generator=made), torch.arange(20))).masked_fill(torch.arange(20) == 7, -1)
    near_pos = torch.stack([torch.randperm(20, generator=made) for _ in range(2)])
    q_pos = torch.tensor([[-1, 2, 19], [4, 11, 12]])
    with use_backend("torch" if kind == "plain" else "reference"):
        got = ops.attend_recent(q, *far, *near, logits, Visibility(q_pos=q_pos, k_pos=far_pos), near_pos, 6)
    plain = tuple(ops.decode_kv(x) for x in far)
    expected = literal(q, plain, near, logits, q_pos, far_pos, near_pos, 6)
    torch.testing.assert_close(got, expected.float(), atol=2e-6, rtol=2e-6)
    assert got[0, :, 0].eq(0).all()


def test_blocks_of_queries_are_one_call() -> None:
    q, far, near = drawn(torch.Generator().manual_seed(0), 1, 1, 700, 900, 8, torch.float32, "cpu")
    for backend in ("reference", "torch"):
        with use_backend(backend):
            whole = ops.attend_recent(q, *far, *near, Logits(0.3), Visibility(), None, 9)
            for first in (0, 511, 512, 699):
                at = Visibility(q_pos=torch.tensor([[200 + first]]))
                one = ops.attend_recent(q[:, :, first : first + 1], *far, *near, Logits(0.3), at, None, 9)
                torch.testing.assert_close(whole[:, :, first : first + 1], one, atol=1e-6, rtol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(
    ("ends", "sinks", "last"),
    [
        ((1499, 1499), False, 64),
        ((70, 1499), True, 64),
        ((-1, 3), True, 64),
        ((63, 64), False, 64),
        ((1499, 1100), True, 1024),  # near keys, too, are cut into parts
    ],
)
def test_the_library_on_a_gpu(dim: int, dtype: torch.dtype, ends: tuple[int, int], sinks: bool, last: int) -> None:
    need("cuda")
    made = torch.Generator().manual_seed(dim)
    q, far, near = drawn(made, 2, 2, 1, 1504, dim, dtype, "cuda")
    q_pos = torch.tensor(ends, device="cuda")[:, None]
    ring = torch.arange(last + 8, device="cuda")  # of the newest tokens, going round
    near_pos = q_pos - (q_pos - ring) % len(ring)
    close = tuple(ops.take_tokens(x, near_pos.clamp(min=0)) for x in near)
    logits = Logits(dim**-0.5, sink_logits=torch.randn(6, device="cuda") if sinks else None)
    arguments = (q, *far, *close, logits, Visibility(q_pos=q_pos), near_pos, last)
    assert recent.reject(*arguments) is None
    got = recent.attend_recent(*arguments)
    assert all(recent.attend_recent(*arguments).equal(got) for _ in range(3))
    with use_backend("reference"):
        expected = ops.attend_recent(q.float(), *far, *(x.float() for x in close), *arguments[5:])
        plain = ops.attend_recent(*arguments)
    ulp = torch.finfo(dtype).eps * expected.abs().clamp(min=1e-3)
    limit = 2 * (plain.float() - expected).abs().amax() + 2 * ulp + 2e-3
    assert ((got.float() - expected).abs() <= limit).all()
    assert (q_pos[:, 0] >= 0).equal(got.ne(0).any(-1).any(-1).any(-1))


def stepped(
    dim: int, dtype: torch.dtype, bits: int, ends: tuple[int, ...], last: int, group: int, device: str
) -> tuple[Any, ...]:
    """Arguments of a step: stores of 1504 tokens, of which those are there that stand before `ends`."""
    made = torch.Generator().manual_seed(dim + last)
    q, _, (k, v) = drawn(made, len(ends), 2, 1, 1504, dim, dtype, device)
    q = torch.cat((q, q.flip(1)), 1)[:, : 2 * group] if group > 3 else q[:, : 2 * group]
    q_pos, ring = torch.tensor(ends, device=device)[:, None], last + 8
    slots = torch.arange(ring, device=device)
    near_pos = q_pos - (q_pos - slots) % ring  # once the token is stored
    near = [ops.take_tokens(x, near_pos.clamp(min=0)) for x in (k, v)]
    fresh = [ops.take_tokens(x, q_pos.clamp(min=0)) for x in (k, v)]
    far = [ops.encode_kv(x, bits) for x in (k, v)]
    for row, end in enumerate(ends if device == "cuda" else ()):  # nobody sees what stands where nothing was stored
        for x in far:
            x.payload[row, :, max(end, 0) :], x.scale[row, :, max(end, 0) :] = 0, torch.nan
        for x in near:
            x[row, :, (near_pos[row] < 0) | (near_pos[row] == end)] = torch.nan
    see = Visibility(q_pos=q_pos)
    return q, *fresh, *far, *near, ring, Logits(dim**-0.5), see, near_pos, last, 1504, ring


def test_a_step_is_what_it_is_made_of() -> None:
    q, k, v, far_k, far_v, near_k, near_v, ring, logits, see, near_pos, last, *_ = arguments = stepped(
        64, torch.float32, 4, (1499, 70), 64, 3, "cpu"
    )
    got = ops.step_recent(*arguments)
    for x, fresh in ((far_k, k), (far_v, v)):
        for row, end in enumerate((1499, 70)):
            one = ops.encode_kv(fresh[row], 4)
            assert x.payload[row, :, end].equal(one.payload[:, 0])
            assert x.scale[row, :, end].equal(one.scale[:, 0])
    for x, fresh in ((near_k, k), (near_v, v)):
        assert all(x[row, :, end % ring].equal(fresh[row, :, 0]) for row, end in enumerate((1499, 70)))
    plain, places = [ops.decode_kv(x) for x in (far_k, far_v)], torch.arange(1504).expand(2, -1)
    expected = literal(q, plain, (near_k, near_v), logits, see.q_pos, places, near_pos, last)
    torch.testing.assert_close(got, expected.float(), atol=2e-6, rtol=2e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(
    ("bits", "ends", "last", "group"),
    [
        (4, (1499, 1503), 64, 3),
        (4, (0, 70), 64, 4),
        (8, (-1, 63), 64, 3),
        (8, (64, 1499), 1, 6),  # more queries than one unit has
        (4, (1499, 1100), 1024, 3),
    ],
)
def test_a_step_on_a_gpu(dim: int, dtype: torch.dtype, bits: int, ends: tuple[int, ...], last: int, group: int) -> None:
    need("cuda")
    arguments = stepped(dim, dtype, bits, ends, last, group, "cuda")
    stores = arguments[3:7]
    held = [torch.nan_to_num(x) for x in _tensors(stores)]
    assert recent.reject_step(*arguments) is None
    got = recent.step_recent(*arguments)
    stored = [x.clone() for x in _tensors(stores)]
    assert all(recent.step_recent(*arguments).equal(got) for _ in range(3))
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(_tensors(stores), stored, strict=True))
    with use_backend("reference"):
        for x, y in zip(_tensors(stores), held, strict=True):
            x.copy_(y)
        plain = ops.step_recent(*arguments)
        assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(_tensors(stores), stored, strict=True))
        far, near = arguments[3:5], [x[:, :, : arguments[7]].float() for x in arguments[5:7]]
        rest = (arguments[8], arguments[9], arguments[10], last)
        expected = ops.attend_recent(arguments[0].float(), *far, *near, *rest)
    ulp = torch.finfo(dtype).eps * expected.abs().clamp(min=1e-3)
    limit = 2 * (plain.float() - expected).abs().amax() + 2 * ulp + 2e-3
    assert ((got.float() - expected).abs() <= limit).all()
    assert (arguments[9].q_pos[:, 0] >= 0).equal(got.ne(0).any(-1).any(-1).any(-1))


def _tensors(stores: Any) -> list[Tensor]:
    return [y for x in stores for y in ([x] if isinstance(x, Tensor) else [x.payload, x.scale, x.zero])]
