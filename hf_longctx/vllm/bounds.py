"""Bounds of keys beside vLLM's paged cache: by physical block, so that whoever shares a block shares its bounds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..select.summaries import MinMax


@dataclass(frozen=True)
class Writing:
    """Where the tokens of one step go: the same in every layer, so worked out once.

    Args:
        tokens: `[T']`, int64, those of the step that are written at all.
        entries: `[E]`, int64, sub-blocks that are written to, `block * subs + sub`.
        places: `[T']`, int64, of each token in `[E, sub]`, flat.
        filled: `[E, sub]`, bool, places that a token goes to.
        fresh: `[E]`, bool, the sub-block is written from its first token on: what it held before is gone.
    """

    tokens: Tensor
    entries: Tensor
    places: Tensor
    filled: Tensor
    fresh: Tensor


class Ledger:
    """How much of each physical block the bounds speak for.

    vLLM writes a block from its first token on whenever it hands it out, after preemption too, and never writes to one
    that is shared. So what was written since the first token is what is there; a write further on is of a block that
    was filled by others.

    Attributes:
        known: `[blocks]`, int64, tokens at the block's start that the bounds hold for; as long as was asked about.
    """

    def __init__(self, summary: MinMax) -> None:
        self.known = torch.zeros(0, dtype=torch.int64)
        self.summary = summary

    def write(self, slots: Tensor) -> Writing:
        """Take down what a step writes.

        Args:
            slots: `[T]`, `block * tokens of a block + place`, -1: not written; tokens of a block in their order.
        """
        sub, block = self.summary.sub, self.summary.block
        tokens = (slots >= 0).nonzero()[:, 0]
        slots = slots[tokens].long()
        entries, inverse = torch.unique(slots // sub, return_inverse=True)
        places = inverse * sub + slots % sub
        filled = torch.zeros(len(entries) * sub, dtype=torch.bool)
        filled[places] = True
        filled = filled.view(-1, sub)
        blocks, inverse = torch.unique(slots // block, return_inverse=True)
        self._reach(blocks)
        place = slots % block
        first = torch.full_like(blocks, block).scatter_reduce_(0, inverse, place, "amin")
        last = torch.zeros_like(blocks).scatter_reduce_(0, inverse, place, "amax")
        known = torch.where(first == 0, 0, self.known[blocks])
        self.known[blocks] = torch.where(first <= known, torch.maximum(known, last + 1), known)
        return Writing(tokens, entries, places, filled, filled[:, 0])

    def unknown(self, table: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks of some rows that the bounds do not speak for, from now on taken to be known: bound them.

        Args:
            table: `[R, M]`, physical blocks of each row.
            lengths: `[R]`, int64, tokens of each row.

        Returns:
            `[n]`, int64, each block once, and `[n]`, int64, tokens in it.
        """
        block = self.summary.block
        held = (lengths[:, None] - torch.arange(table.shape[1]) * block).clamp(0, block)
        ids = torch.where(held > 0, table.long(), 0)
        self._reach(ids)
        missing = self.known[ids] < held
        if not missing.any():
            return ids.new_empty(0), ids.new_empty(0)
        blocks, inverse = torch.unique(ids[missing], return_inverse=True)
        tokens = torch.zeros_like(blocks).scatter_reduce_(0, inverse, held[missing], "amax")
        self.known[blocks] = tokens
        return blocks, tokens

    def _reach(self, blocks: Tensor) -> None:
        more = int(blocks.max()) + 1 - len(self.known) if blocks.numel() else 0
        if more > 0:
            self.known = torch.cat((self.known, self.known.new_zeros(more)))


class BlockBounds:
    """Least and largest key of each sub-block of one layer.

    Attributes:
        values: `[blocks, Hkv, subs, 2, D]`, dtype of the keys.
    """

    def __init__(self, blocks: int, kv_heads: int, dim: int, dtype: torch.dtype, summary: MinMax) -> None:
        self.summary = summary
        self.values = torch.zeros(blocks, kv_heads, summary.block // summary.sub, 2, dim, dtype=dtype)

    def write(self, keys: Tensor, writing: Writing) -> None:
        """Widen the bounds by the keys of a step.

        Args:
            keys: `[T, Hkv, D]`, or more: those after T are padding.
            writing: of the step.
        """
        spread = keys.new_zeros(writing.filled.numel(), *keys.shape[1:])
        spread[writing.places] = keys[writing.tokens]
        spread = spread.view(*writing.filled.shape, *keys.shape[1:]).transpose(1, 2)
        made = self.summary.fold(spread, writing.filled[:, None], None)
        subs = self.values.shape[2]
        at = (writing.entries // subs, slice(None), writing.entries % subs)
        old = self.values[at]
        least, largest = torch.minimum(old[..., 0, :], made[..., 0, :]), torch.maximum(old[..., 1, :], made[..., 1, :])
        wider = torch.stack((least, largest), -2)
        self.values[at] = torch.where(writing.fresh[:, None, None, None], made, wider)

    def bound(self, blocks: Tensor, keys: Tensor, tokens: Tensor) -> None:
        """Make the bounds of whole blocks anew.

        Args:
            blocks: `[n]`, int64.
            keys: `[n, Hkv, block, D]`, as the cache holds them.
            tokens: `[n]`, int64, of each block that are there.
        """
        filled = torch.arange(self.summary.block) < tokens[:, None]
        shape = (len(blocks), 1, -1, self.summary.sub)
        made = self.summary.fold(torch.unflatten(keys, 2, shape[2:]), filled.view(shape), None)
        self.values[blocks] = made

    def rows(self, table: Tensor) -> Tensor:
        """The bounds of rows of physical blocks `[R, M]`, in the order of the text: `[R, Hkv, M * subs, 2, D]`."""
        heads = torch.arange(self.values.shape[1])[:, None]
        return self.values[table[:, None], heads].flatten(2, 3)
