"""What is kept beside each block of keys, so that it can be scored unread."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import primitive, require_whole


@primitive
@dataclass(frozen=True)
class MinMax:
    """Per channel, the least and the largest value of the keys in each block of `sub` tokens.

    Paper: Quest (arXiv:2406.10774) §3.2; with `sub` below `block` LServe's logical pages (arXiv:2502.14866) §3.5.

    Args:
        block: tokens of a block that is read or not.
        sub: tokens behind one pair of bounds; divides the block.

    Raises:
        ValueError: a size that is no whole number from one on, or a `sub` that does not divide the block.
    """

    block: int = 16
    sub: int = 16

    def __post_init__(self) -> None:
        require_whole("MinMax", block=self.block, sub=self.sub)
        if self.block % self.sub:
            raise ValueError(
                f"MinMax: expected a block of whole logical pages; got block={self.block}, sub={self.sub}. "
                "Give a sub that divides the block, such as 64 and 16."
            )

    @property
    def local(self) -> bool:
        """Bounds follow from the keys alone."""
        return False

    @property
    def weighs(self) -> bool:
        """The keys alone say it."""
        return False

    def describe(self) -> str:
        """One phrase for a table."""
        return f"bounds of {self.block}" + (f" in {self.sub}s" if self.sub != self.block else "")

    def fold(self, k: Tensor, filled: Tensor | None, mass: Tensor | None) -> Tensor:
        """Bounds of keys.

        Args:
            k: `[..., sub, D]`.
            filled: `[..., sub]`, bool, False where there is no key; None: all are there.
            mass: not used.

        Returns:
            `[..., 2, D]`, dtype of k: least, then largest; of no key +inf and -inf.
        """
        if filled is None:
            return torch.stack((k.amin(-2), k.amax(-2)), -2)
        missing = ~filled[..., None]
        least = k.masked_fill(missing, float("inf")).amin(-2)
        return torch.stack((least, k.masked_fill(missing, float("-inf")).amax(-2)), -2)


@primitive
@dataclass(frozen=True)
class Means:
    """The means of keys that follow each other, `sub` at a time.

    Differs from InfLLM (arXiv:2402.04617) §3.2, whose representatives are the keys that got most attention: mean keys
    of short runs, as of InfLLM v2 (arXiv:2509.24663), find a short passage in a block where those do not.

    Args:
        block: tokens of a block.
        sub: tokens behind one mean; divides the block.
        bits: that a channel of a mean takes, 4 or 8, beside a scale and a zero; None: as keys are.

    Raises:
        ValueError: a size that is no whole number from one on, a sub that does not divide the block, or other bits.
    """

    block: int = 128
    sub: int = 16
    bits: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (None, 4, 8):
            raise ValueError(f"Means: expected bits of 4, 8 or None; got {self.bits!r}. 8 are as good as none.")
        require_whole("Means", block=self.block, sub=self.sub)
        if self.block % self.sub:
            raise ValueError(
                f"Means: expected a block of whole runs of keys; got block={self.block}, sub={self.sub}. Use 16 of 128."
            )

    @property
    def local(self) -> bool:
        """A block is summed up when it is full and far."""
        return True

    @property
    def weighs(self) -> bool:
        """The keys alone say it."""
        return False

    def describe(self) -> str:
        """One phrase for a table."""
        return f"{self.block // self.sub} means of {self.block}" + (f" in {self.bits} bits" if self.bits else "")

    def fold(self, k: Tensor, filled: Tensor | None, mass: Tensor | None) -> Tensor:
        """The mean.

        Args:
            k: `[..., sub, D]`, at one position.
            filled: not used: a block that is closed is full.
            mass: not used.

        Returns:
            `[..., 1, D]`, dtype of k.
        """
        return k.to(torch.promote_types(k.dtype, torch.float32)).mean(-2, keepdim=True).to(k.dtype)


@primitive
@dataclass(frozen=True)
class Representatives:
    """The mean of the `count` keys of each block that got most attention from the queries near them.

    Paper: InfLLM (arXiv:2402.04617) §3.2. Differs: per KV head, whose query heads' attention is added; the paper's code
    keeps one set of keys per query head. The mean says as much as the keys apart, for scores are sums over them.

    Args:
        block: tokens of a block.
        count: keys that stand for it.

    Raises:
        ValueError: a size that is no whole number from one on, or a count above the block.
    """

    block: int = 128
    count: int = 4

    def __post_init__(self) -> None:
        require_whole("Representatives", block=self.block, count=self.count)
        if self.count > self.block:
            raise ValueError(
                f"Representatives: expected a count between 1 and the block of {self.block}; got {self.count}. "
                "The paper uses 4 of 128."
            )

    @property
    def sub(self) -> int:
        """One entry a block."""
        return self.block

    @property
    def local(self) -> bool:
        """The block must have left the local window of every query to come."""
        return True

    @property
    def weighs(self) -> bool:
        """Attention says which keys they are."""
        return True

    def describe(self) -> str:
        """One phrase for a table."""
        return f"{self.count} representatives of {self.block}"

    def fold(self, k: Tensor, filled: Tensor | None, mass: Tensor | None) -> Tensor:
        """The mean of the keys with most mass; of equal ones the first.

        Args:
            k: `[..., block, D]`, at one position.
            filled: not used: a block that is closed is full.
            mass: `[..., block]`, float32, attention that each key got.

        Returns:
            `[..., 1, D]`, dtype of k.
        """
        assert mass is not None
        best = mass.sort(dim=-1, descending=True, stable=True).indices[..., : self.count, None]
        chosen = k.gather(-2, best.expand(*best.shape[:-1], k.shape[-1]))
        return chosen.to(torch.promote_types(k.dtype, torch.float32)).mean(-2, keepdim=True).to(k.dtype)
