"""How much a block of keys matters to a block of queries."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kernels import ops
from ..plan import primitive, require_whole
from .summaries import Means, MinMax, Representatives


@dataclass(frozen=True)
class Look:
    """What a scorer may look at.

    Args:
        q: `[B, Hq, N * Q, D]`, queries in blocks of Q; each block's tokens first, then zeros.
        q_pos: `[B or 1, N * Q]`, int64, their positions, -1 where there is none.
        k: `[B, Hkv, S, D]`, the keys; column s holds position s.
        summary: `[B, Hkv, M', R, D]`, one entry per sub-block, where the scorer has a summary.
        q_block: Q.
        scale: factor of the products.
        share: as in `Selector`.
        turns: how queries are turned to keys, where positions are small.
        low: `[B or 1, N]`, int64, first block of keys that is near a block of queries: those before it compete.
    """

    q: Tensor
    q_pos: Tensor
    k: Tensor | ops.Packed
    summary: Tensor | None
    q_block: int
    scale: float
    share: str
    turns: ops.Turns | None
    low: Tensor

    def mean_query(self) -> Tensor:
        """`[B, Hq, N, D]`, float32 or better, of each block; at the edge of the window where positions are clamped."""
        q = self.q.to(torch.promote_types(self.q.dtype, torch.float32))
        turns = self.turns
        if turns is not None and turns.clamp is not None and turns.inv_freq is not None:
            here = self.q_pos - turns.lap * turns.laps(self.q_pos)
            q = ops.rotate(q, turns.clamp - here, turns.inv_freq, turns.interleaved)
        real = (self.q_pos >= 0).view(self.q_pos.shape[0], 1, -1, self.q_block, 1)
        blocks = torch.unflatten(q, 2, (-1, self.q_block)) * real
        return blocks.sum(3) / real.sum(3).clamp(min=1)


@primitive
@dataclass(frozen=True)
class UpperBound:
    """The largest product that a key within the block's bounds could have; over the heads that share, the maximum.

    Paper: Quest (arXiv:2406.10774) §3.3; over logical pages the maximum, LServe (arXiv:2502.14866) §3.5.
    """

    summary: MinMax = field(default_factory=MinMax)

    @property
    def block(self) -> int:
        """Tokens of a block of keys."""
        return self.summary.block

    @property
    def q_block(self) -> int:
        """Each query for itself."""
        return 1

    @property
    def phases(self) -> tuple[str, ...]:
        """One query at a time."""
        return ("decode",)

    @property
    def is_mass(self) -> bool:
        """Scores are products."""
        return False

    @property
    def clamped(self) -> bool:
        """Bounds hold for keys as they are rotated."""
        return False

    def describe(self) -> str:
        """One phrase for a table."""
        return f"upper bound ({self.summary.describe()})"

    def score(self, look: Look) -> Tensor:
        """Score every block: `[B, Hs, N, M]`, float32 or better."""
        assert look.summary is not None
        return ops.score_pages(look.q, look.summary, self.summary.block // self.summary.sub, look.share)


@primitive
@dataclass(frozen=True)
class RepresentativeDot:
    """The mean product of the block of queries with the block's representative, the largest if there are several.

    Over the heads that share, the mean.

    Paper: InfLLM (arXiv:2402.04617) §3.2.

    Args:
        summary: how representatives are found.
        q_block: queries of a prefill call that share a selection.

    Raises:
        ValueError: a `q_block` that is no whole number from one on.
    """

    summary: Representatives | Means = field(default_factory=Representatives)
    q_block: int = 512

    def __post_init__(self) -> None:
        require_whole(type(self).__name__, q_block=self.q_block)

    @property
    def block(self) -> int:
        """Tokens of a block of keys."""
        return self.summary.block

    @property
    def phases(self) -> tuple[str, ...]:
        """Representatives are found in prefill, and used in both."""
        return ("prefill", "decode")

    @property
    def is_mass(self) -> bool:
        """Near blocks have no score that could count."""
        return False

    @property
    def clamped(self) -> bool:
        """Representatives are kept without rotation where positions are clamped."""
        return True

    def describe(self) -> str:
        """One phrase for a table."""
        return self.summary.describe()

    def score(self, look: Look) -> Tensor:
        """Score every block: `[B, Hs, N, M]`, float32 or better."""
        assert look.summary is not None
        return ops.score_pages(look.mean_query(), look.summary, self.summary.block // self.summary.sub, look.share)


@primitive
@dataclass(frozen=True)
class RepresentativeShare(RepresentativeDot):
    """The share of far attention that a block's representatives would get from the mean of the block of queries.

    Each query head has a softmax over the representatives of all blocks that are not near; of the heads that share, the
    mean counts: a head that looks for one passage outvotes many that look for none.

    Differs from InfLLM (arXiv:2402.04617) §3.2, which adds up products.

    Args:
        summary: how representatives are found.
        q_block: queries of a prefill call that share a selection.

    Raises:
        ValueError: a `q_block` that is no whole number from one on.
    """

    summary: Representatives | Means = field(default_factory=Means)

    def describe(self) -> str:
        """One phrase for a table."""
        return f"shares of {self.summary.describe()}"

    def score(self, look: Look) -> Tensor:
        """Score every block: `[B, Hs, N, M]`, float32 or better; -inf from `look.low` on."""
        assert look.summary is not None
        subs = self.summary.block // self.summary.sub
        x = ops.score_pages(look.mean_query(), look.summary, 1, "q_head") * look.scale
        x = torch.unflatten(pad(x, (0, -x.shape[-1] % subs)), -1, (-1, subs))  # [B, Hq, N, M, subs]
        near = (torch.arange(x.shape[3], device=x.device) >= look.low[..., None])[:, None]
        weights = x.masked_fill(near[..., None], float("-inf")).flatten(3).softmax(-1)
        shares = weights.view_as(x).sum(-1)
        if look.share != "q_head":
            heads = 1 if look.share == "all" else look.k.shape[1]
            shares = torch.unflatten(shares, 1, (heads, -1)).mean(2)
        return shares.masked_fill(near, float("-inf"))


@primitive
@dataclass(frozen=True)
class Antidiagonal:
    """Attention on sums of antidiagonals of tiles of `stride` x `stride` products, added up over each block.

    Paper: XAttention (arXiv:2503.16428) §2.1. Over the heads that share, the mean.

    Args:
        block: tokens of a block of queries and of keys.
        stride: tokens of a tile; divides the block.
        rounded: tiles are multiplied as floats (`fp8`) or whole numbers (`int8`) of 8 bits; empty: as they are.

    Raises:
        ValueError: a size that is no whole number from one on, a stride that does not divide the block, or rounding of
            another kind.
    """

    block: int = 128
    stride: int = 16
    rounded: str = ""

    def __post_init__(self) -> None:
        require_whole("Antidiagonal", block=self.block, stride=self.stride)
        if self.block % self.stride:
            raise ValueError(
                f"Antidiagonal: expected a stride that divides the block of {self.block}; got {self.stride}. "
                "Use 4, 8 or 16."
            )
        if self.rounded not in ("", "fp8", "int8"):
            raise ValueError(f"Antidiagonal: expected rounded to be '', 'fp8' or 'int8'; got {self.rounded!r}. Use ''.")

    @property
    def summary(self) -> None:
        """Keys are read themselves."""
        return None

    @property
    def q_block(self) -> int:
        """As long as a block of keys."""
        return self.block

    @property
    def phases(self) -> tuple[str, ...]:
        """Many queries at a time."""
        return ("prefill",)

    @property
    def is_mass(self) -> bool:
        """Scores are shares of attention."""
        return True

    @property
    def clamped(self) -> bool:
        """Products are taken as keys are rotated."""
        return False

    def describe(self) -> str:
        """One phrase for a table."""
        return f"antidiagonals ({self.block}, stride {self.stride}{self.rounded and f', {self.rounded}'})"

    def score(self, look: Look) -> Tensor:
        """Score every block: `[B, Hs, N, M]`, float32 or better; a row adds up to the block's tiles."""
        sizes = (self.block, self.stride, look.scale)
        scores = ops.score_antidiagonal(look.q, look.k, look.q_pos, *sizes, True, self.rounded)
        if look.share == "q_head":
            return scores
        rows, _, blocks, columns = scores.shape
        return scores.view(rows, 1 if look.share == "all" else look.k.shape[1], -1, blocks, columns).mean(2)
