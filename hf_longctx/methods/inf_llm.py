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
from ..select.scorers import RepresentativeDot
from ..select.summaries import Means, Representatives
from .kv import kv_format
from .layouts import require_full_attention, require_small_positions, uniform

_LOCAL = 4096


@dataclass(frozen=True)
class InfLLM:
    """A query reads sinks, a local window and the best blocks between, all that is far at the window's edge.

    Paper: InfLLM (arXiv:2402.04617) §3. Differs: blocks are chosen per KV head, and by the means of short runs of keys,
    which find a passage that the keys with most attention miss; `by="attention"` and 4 representatives are the paper's,
    by softmax weight as in the authors' code. Dense where local >= length.

    Args:
        init: first tokens that are always read; whole blocks.
        local: last tokens that are always read; None: 4096, or half of the trained length if that is less.
        block: tokens of a block.
        topk: blocks that are read beside.
        representatives: vectors that stand for a block.
        by: what they are: `place`, each the mean of as many keys in a row; `attention`, together the mean of those keys
            that got most attention from the queries near them.
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
    representatives: int = 8
    by: Literal["place", "attention"] = "place"
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
            raise ValueError(f"InfLLM: expected {said}. 8 of 128 stand for 16 keys each.")
        self._policy(_LOCAL if self.local is None else self.local)
        for name, holds, wanted in (
            ("init", self.init % self.block == 0, f"in whole blocks of {self.block}"),
            ("offload", self.offload or (self.host_ram or self.disk) is None, "True beside host_ram or disk"),
        ):
            if not holds:
                raise ValueError(f"InfLLM: expected {name} {wanted}; got {getattr(self, name)!r}. Change one of them.")

    @property
    def _summary(self) -> Means | Representatives:
        if self.by == "attention":
            return Representatives(self.block, self.representatives)
        return Means(self.block, self.block // self.representatives)

    def _policy(self, local: int) -> HeadPolicy:
        scorer = RepresentativeDot(self._summary, self.q_block)
        reads = Selector(scorer, TopK(self.topk * self.block), self.init, local)
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
