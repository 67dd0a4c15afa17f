"""What an operator sets: one variable of the environment, which every process of vLLM inherits."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from ..plan.whole import require_whole

if TYPE_CHECKING:
    from ..plan import Selector
    from ..select.summaries import MinMax

VARIABLE = "HF_LONGCTX_VLLM_QUEST"
"""Set to a JSON object of knobs (`{}`: the defaults), it has decode steps read chosen pages."""


@dataclass(frozen=True)
class PageChoice:
    """A decode step reads `token_budget` tokens of a longer context, in vLLM's own blocks; prompts are vLLM's.

    Paper: Quest (arXiv:2406.10774) §3; bounds of logical pages inside a block, LServe (arXiv:2502.14866) §3.5.
    Differs: see `methods.Quest`; pages are chosen anew at every step, and no head streams. Up to `token_budget` tokens
    of context everything is vLLM's own.

    Args:
        token_budget: tokens that a step reads in all; whole blocks (`--block-size`).
        sub: tokens behind one pair of bounds; divides the block.
        dense_layers: first layers, which read everything.
        share: `kv_head`: each KV head chooses; `all`: one choice for all heads of a layer.
        sink: first tokens that are always read.
        local: last tokens that are always read; the query's block always is.
    """

    token_budget: int = 2048
    sub: int = 16
    dense_layers: int = 2
    share: Literal["kv_head", "all"] = "kv_head"
    sink: int = 4
    local: int = 1

    def __post_init__(self) -> None:
        require_whole(VARIABLE, 0, dense_layers=self.dense_layers)
        require_whole(VARIABLE, token_budget=self.token_budget, sub=self.sub)
        if self.share not in ("kv_head", "all"):
            raise ValueError(f"{VARIABLE}: expected share 'kv_head' or 'all'; got {self.share!r}. Give one of them.")

    @classmethod
    def read(cls, text: str) -> PageChoice:
        """Knobs from a JSON object.

        Raises:
            ValueError: no object, a knob that there is not, or a value that it does not take.
        """
        try:
            said = json.loads(text)
        except json.JSONDecodeError:
            said = None
        known = [knob.name for knob in fields(cls)]
        if not isinstance(said, dict) or not said.keys() <= set(known):
            example = f"{VARIABLE}='{{\"token_budget\": 1024}}'"
            raise ValueError(f"{VARIABLE}: expected a JSON object of {', '.join(known)}; got {text!r}. Try {example}.")
        return cls(**said)

    def summary(self, block: int) -> MinMax:
        """What is kept beside vLLM's blocks of so many tokens; errors as `selector`."""
        from ..select.summaries import MinMax

        return MinMax(block, self.sub)

    def selector(self, block: int) -> Selector:
        """The choice for vLLM's blocks of so many tokens.

        Raises:
            ValueError: a budget that is not whole blocks, or has no room; a `sub` that does not divide the block.
        """
        from ..methods.pages import best_pages

        return best_pages(VARIABLE, self.token_budget, self.summary(block), self.sink, self.local, self.share, 1)
