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


@dataclass(eq=False)
class Prefill:
    """In place of the model's `_prefill`: the last token of a prompt chooses for itself, as the tokens after it do.

    It asks the question: among the hundreds of queries that share a choice, its own would hardly count.
    Paper: InfLLM (arXiv:2402.04617), whose code reads all but the last token, and then that.
    """

    model: PreTrainedModel
    state: Patch

    def __call__(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Read all but the last token first, where that makes a difference."""
        stock: Any = type(self.model)
        if self._shares(input_ids, generation_config, model_kwargs):
            before = {
                name: value[:, :-1] if name in ("attention_mask", "position_ids") and value is not None else value
                for name, value in model_kwargs.items()
            }
            stock._prefill(self.model, input_ids[:, :-1], generation_config, before, *args, **kwargs)
            generation_config = copy(generation_config)
            generation_config.prefill_chunk_size = None  # 5.17 cuts chunks of all the text, of what the cache has too
        return stock._prefill(self.model, input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _shares(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> bool:
        """True if the last token would share a choice, and the call is one of text alone."""
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
