"""How `generate()` reads a prompt whose blocks of queries share a choice of what they read."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from .cache.cache import LongContextCache
from .cache.step import FEW

if TYPE_CHECKING:
    from .hooks import Patch

_OF_TEXT = frozenset({"past_key_values", "attention_mask", "position_ids", "use_cache", "logits_to_keep"})

TAIL = 32
"""Last tokens of a prompt that choose for themselves: a question, and what a chat template puts after it."""


@dataclass(eq=False)
class Prefill:
    """In place of the model's `_prefill`: each of the last tokens of a prompt chooses what it reads, as those after it.

    They ask the question: among the hundreds of queries that share a choice, they would hardly count.
    Paper: InfLLM (arXiv:2402.04617). Differs: its code reads the very last token apart.
    """

    model: PreTrainedModel
    state: Patch

    def __call__(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Read all but the last tokens first, where that makes a difference, then those a few at a time."""
        stock: Any = type(self.model)
        ends = self._ends(input_ids, generation_config, model_kwargs)
        for number, end in enumerate((*ends, input_ids.shape[1])):
            config, cut = copy(generation_config), end < input_ids.shape[1]
            if number:
                config.prefill_chunk_size = None  # 5.17 cuts chunks of all the text, of what the cache has too
            if cut and getattr(config, "_mask_length", None) is not None:
                config._mask_length = end
            these = {
                name: value[:, :end] if name in ("attention_mask", "position_ids") and value is not None else value
                for name, value in model_kwargs.items()
            }
            given = these if cut else model_kwargs
            out = stock._prefill(self.model, input_ids[:, :end], config, given, *args, **kwargs)
        return out

    def _ends(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> list[int]:
        """Where the calls before the last one end."""
        if not self._shares(input_ids, generation_config, model_kwargs):
            return []
        length, known = input_ids.shape[1], model_kwargs["past_key_values"].ledger.columns
        tail = max(known, length - TAIL)
        return [end for end in range(tail, length, FEW) if end > known]

    def _shares(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> bool:
        """True if the last tokens would share a choice, and the call is one of text alone."""
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        known = {name for name, value in model_kwargs.items() if value is not None}
        constant = self.state.facts.longest_in_cache  # beyond it, rotary frequencies follow the length of a call
        columns = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        return (
            any(group.policy.prefill is not None for layer in self.state.plan.layers for group in layer.groups)
            and isinstance(cache, LongContextCache)
            and columns == input_ids.shape[1]  # the whole text, whatever the cache has of it
            and (constant is None or columns <= constant)
            and known <= _OF_TEXT
            and input_ids.shape[1] - cache.ledger.columns > FEW + 1
        )
