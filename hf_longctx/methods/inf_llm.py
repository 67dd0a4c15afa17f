"""InfLLM: a local window, and a memory in host RAM of which the blocks that matter are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..cache.placement import HostLRU
from ..cache.positions import Clamped
from ..cache.retention import KeepAll
from ..errors import UnsupportedError
from ..models import ModelFacts
from ..plan import HeadPolicy, KVFormat, Plan, Selector, require_whole
from ..select.budgets import TopK
from ..select.scorers import RepresentativeDot, RepresentativeShare
from ..select.summaries import Means, Representatives
from .kv import kv_format
from .layouts import require_full_attention, require_small_positions, uniform

_LOCAL = 4096
_BITS = {"native": None, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class InfLLM:
    """A query reads sinks, a local window and the best blocks between, all that is far at the window's edge.

    Paper: InfLLM (arXiv:2402.04617) §3. Differs: blocks are chosen by the attention that the means of short runs of
    keys would get, which finds passages that products with the keys of most attention miss; `by="attention"` with 4
    representatives chooses as the paper does. All heads of a layer share a choice, as in the authors' code. Dense where
    local >= length.

    Args:
        init: first tokens that are always read; whole blocks.
        local: last tokens that are always read; None: 4096, or half of the trained length if that is less.
        block: tokens of a block.
        topk: blocks that are read beside.
        representatives: vectors that stand for a block.
        by: what they are: `place`, each the mean of as many keys in a row; `attention`, together the mean of those keys
            that got most attention from the queries near them.
        index: how what stands for blocks is held on the device: `native`, or of `place` `int8` or `int4`.
        share: which heads share a choice: `all` of a layer, or those of a `kv_head`.
        q_block: queries of a prompt that share a choice.
        resident_blocks: blocks that stay on the device, as in `HostLRU`.
        host_ram: most host memory, in bytes or as "32GiB"; None: no cap.
        disk: folder for a file in its place.
        kv: how keys and values are stored: `native`, `int8` or `int4`.
        offload: False leaves everything on the device.
    """

    init: int = 128
    local: int | None = None
    block: int = 128
    topk: int = 16
    representatives: int = 16
    by: Literal["place", "attention"] = "place"
    index: Literal["native", "int8", "int4"] = "native"
    share: Literal["all", "kv_head"] = "all"
    q_block: int = 512
    resident_blocks: int = 32
    host_ram: int | str | None = None
    disk: str | None = None
    kv: str | KVFormat = "native"
    offload: bool = True

    def __post_init__(self) -> None:
        require_whole("InfLLM", topk=self.topk, block=self.block, representatives=self.representatives)
        if self.by not in ("place", "attention"):
            raise ValueError(f"InfLLM: expected by as 'place' or 'attention'; got {self.by!r}. 'place' finds more.")
        if self.block % self.representatives and self.by == "place":
            said = f"representatives that divide the block of {self.block}; got {self.representatives}"
            raise ValueError(f"InfLLM: expected {said}. 16 of 128 stand for 8 keys each.")
        if self.index not in _BITS:
            raise ValueError(
                f"InfLLM: expected index among {', '.join(_BITS)}; got {self.index!r}. 'int4' is smallest."
            )
        if self.share not in ("all", "kv_head"):
            raise ValueError(f"InfLLM: expected share as 'all' or 'kv_head'; got {self.share!r}. 'all' finds more.")
        self._policy(_LOCAL if self.local is None else self.local)
        for name, holds, wanted in (
            ("init", self.init % self.block == 0, f"in whole blocks of {self.block}"),
            ("index", self.index == "native" or self.by == "place", "'native' beside by='attention'"),
            ("offload", self.offload or (self.host_ram or self.disk) is None, "True beside host_ram or disk"),
        ):
            if not holds:
                raise ValueError(f"InfLLM: expected {name} {wanted}; got {getattr(self, name)!r}. Change one of them.")

    @property
    def _scorer(self) -> RepresentativeShare | RepresentativeDot:
        if self.by == "attention":
            return RepresentativeDot(Representatives(self.block, self.representatives), self.q_block)
        means = Means(self.block, self.block // self.representatives, _BITS[self.index])
        return RepresentativeShare(means, self.q_block)

    def _policy(self, local: int) -> HeadPolicy:
        reads = Selector(self._scorer, TopK(self.topk * self.block), self.init, local, self.share)
        place = HostLRU(self.resident_blocks, self.host_ram, self.disk) if self.offload else None
        return HeadPolicy(KeepAll(), Clamped(max(local - 1, 1)), reads, reads, kv_format(self.kv, "InfLLM"), place)

    def plan(self, facts: ModelFacts) -> Plan:
        """The plan for a model; raises UnsupportedError if its positions do not stay as they are up to `local`."""
        require_full_attention("inf_llm", facts)
        require_small_positions("inf_llm", facts, "local", (self.local or 1,))
        trained = getattr(facts.config, "max_position_embeddings", None)
        local = self.local or min(_LOCAL, (trained or 2 * _LOCAL) // 2, facts.longest_in_cache or _LOCAL)
        if trained and local > trained:
            said = f"expected local <= {trained}, on which '{facts.family}' was trained; got {local}"
            raise UnsupportedError(f"inf_llm: {said}. Leave it out, or use {trained // 2}.")
        return uniform("inf_llm", facts, self._policy(local))
