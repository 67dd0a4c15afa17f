"""Random arguments of `attend_blocks`, of many queries, as stores and selectors hand them in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_longctx.kernels import ops
from hf_longctx.kernels.ops import Logits, Packed, Selection, Turns, Visibility


@dataclass(frozen=True)
class Case:
    """What a call is like; everything else is drawn from `seed`.

    Args:
        sizes: rows, KV heads, query heads of each, queries of a row, stored tokens, channels.
        ends: position of each row's last query, -1 for a row without one; None: the last column.
        lists: tokens of a block of keys, of a block of queries, and how many blocks are chosen: `some`, `all`, `one`
            or `own`, the last that a query can see.
        share: who shares a selection.
        pages: blocks lie in any order.
        bits: keys and values are packed; 0: as they are.
        lap: keys stand at lap positions; 0: at their own.
        clamp: the largest distance.
        rotated: channels that are turned; 0: none, and slopes alone go by distance.
        ring: tokens stored before, and of the call, in each row, as a store with a window hands them out; else columns
            are positions.
        loud: logits are so many times as large.
    """

    sizes: tuple[int, int, int, int, int, int] = (1, 2, 2, 300, 300, 128)
    dtype: torch.dtype = torch.bfloat16
    ends: tuple[int, ...] | None = None
    sink: int = 0
    window: int | None = None
    softcap: float | None = None
    sink_logits: bool = False
    slopes: bool = False
    lists: tuple[int, int, str] | None = None
    share: str = "q_head"
    pages: bool = False
    bits: int = 0
    lap: int = 0
    clamp: int | None = None
    rotated: int = 64
    interleaved: bool = False
    ring: tuple[tuple[int, int], ...] | None = None
    loud: float = 1.0
    seed: int = 0


def made(case: Case, device: str) -> tuple[Any, ...]:
    """Arguments: columns after the last query of every row hold NaN."""
    rows, kv_heads, group, tokens, stored, dim = case.sizes
    generator = torch.Generator().manual_seed(case.seed)
    q_pos, k_pos = _places(case)
    stored = stored if k_pos is None else k_pos.shape[1]
    q, *both = (
        torch.randn(rows, n, heads, dim, generator=generator).to(case.dtype).transpose(1, 2)
        for heads, n in ((kv_heads * group, tokens), (kv_heads, stored), (kv_heads, stored))
    )
    k, v = (_packed(x.to(device), case.bits) if case.bits else x for x in both)
    if case.ends is not None and not case.pages:
        for x in (k, v):
            (x if isinstance(x, Tensor) else x.scale)[:, :, max(case.ends) + 1 :] = torch.nan
    logits = Logits(
        case.loud * dim**-0.5,
        case.softcap,
        torch.randn(kv_heads * group, generator=generator).to(case.dtype) if case.sink_logits else None,
        torch.rand(kv_heads * group, generator=generator) / 8 if case.slopes else None,
    )
    selection = None if case.lists is None else _selection(case, q_pos, generator, device)
    logits, k, v = (_moved(x, device) for x in (logits, k, v))
    see = _moved(Visibility(case.sink, case.window, q_pos, k_pos), device)
    return q.to(device), k, v, logits, see, _turns(case, generator, device), selection


def _packed(x: Tensor, bits: int) -> Packed:
    """As a store has them that has room for more."""
    stored = x.shape[2]
    packed = ops.encode_kv(pad(x, (0, 0, 0, 64 - stored % 64)), bits)
    return replace(packed, **{n: y[:, :, :stored] for n, y in vars(packed).items() if isinstance(y, Tensor)})


def _moved(x: Any, device: str) -> Any:
    if isinstance(x, Tensor):
        return x.to(device)
    return replace(x, **{name: y.to(device) for name, y in vars(x).items() if isinstance(y, Tensor)})


def _places(case: Case) -> tuple[Tensor | None, Tensor | None]:
    """Positions of queries, and of columns: sinks, then what is left of the window, then the call's own."""
    tokens = torch.arange(case.sizes[3])
    if case.ring is None:
        ends = None if case.ends is None else torch.tensor(case.ends)[:, None]
        return None if ends is None else (ends - tokens.flip(0)).clamp(min=-1), None
    assert case.window is not None
    before, count = torch.tensor(case.ring).T[..., None]
    own = torch.where(tokens < count, before + tokens, -1)
    sinks = torch.arange(case.sink).expand(len(before), -1)
    beyond = torch.cat((before - case.window + torch.arange(case.window), own), 1)
    beyond = beyond.where(beyond >= case.sink, -1)
    return own, torch.cat((sinks.where(sinks < before + count, -1), beyond), 1)


def _turns(case: Case, generator: torch.Generator, device: str) -> Turns | None:
    """Frequencies as models have them; offsets that no tile begins at."""
    if not case.lap:
        return None
    sinks = torch.randint(0, case.sink + (case.window or 1), (case.sizes[0], case.sizes[3]), generator=generator)
    pairs = case.rotated // 2
    inv_freq = None if not pairs else (10000.0 ** -(torch.arange(pairs) / pairs)).to(device)
    return Turns(sinks.to(device), case.lap, case.sink + 3, inv_freq, case.interleaved, case.clamp)


def _selection(case: Case, q_pos: Tensor | None, generator: torch.Generator, device: str) -> Selection:
    """Lists that reach beyond the queries, some of them empty; a block that is chosen need not be seen."""
    rows, kv_heads, group, tokens, stored, _ = case.sizes
    assert case.lists is not None
    block, q_block, kind = case.lists
    heads = {"all": 1, "kv_head": kv_heads, "q_head": kv_heads * group}[case.share]
    count, blocks = -(-tokens // q_block), -(-stored // block)
    places = torch.arange(stored - tokens, stored) if q_pos is None else q_pos.amax(0)
    ids = torch.full((rows, heads, count, blocks), -1, dtype=torch.int32)
    pages = ids.clone()
    for at in torch.cartesian_prod(*(torch.arange(n) for n in (rows, heads, count))).reshape(-1, 3).tolist():
        own = int(places[: (at[2] + 1) * q_block].max()) // block
        filled = {"some": int(torch.randint(0, blocks + 1, (), generator=generator)), "all": blocks}.get(kind, 1)
        chosen = torch.randperm(blocks, generator=generator)[:filled].sort().values
        ids[(*at, slice(filled))] = torch.tensor([own]) if kind == "own" else chosen.int()
        pages[(*at, slice(filled))] = torch.randperm(blocks, generator=generator)[:filled].int()
    return Selection(ids.to(device), block, q_block, pages.to(device) if case.pages else None)
