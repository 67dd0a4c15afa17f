"""How `generate()` reads a prompt: a long one in pieces, and its last tokens apart where queries share a choice."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .ahead import expect
from .cache.cache import LongContextCache
from .cache.share import begin, join, lend, shareable
from .cache.step import FEW, TAIL
from .graph import RECORDERS
from .limits import reads_all_to
from .memory import check_room
from .models import CACHE
from .recording import room_after

if TYPE_CHECKING:
    from .hooks import Patch

_OF_TEXT = frozenset({CACHE, "attention_mask", "position_ids", "use_cache", "logits_to_keep"})

PIECE = 16384
"""Tokens that one call reads of a prompt: what a layer computes for them is held, and must not grow with the prompt. Of
many rows some are read after the others, so that none is cut into short pieces, which read again what is stored. Where
stores hold more than keys and values, all rows go together, a quarter of such a piece of each at least."""


def rows_at_once(cache: LongContextCache, rows: int, columns: int) -> int:
    """How many rows of a prompt are read together, unless the caller or somebody who watches must have all."""
    return min(rows, max(1, PIECE // columns)) if shareable(cache) else rows


@dataclass(eq=False)
class Prefill:
    """In place of the model's `_prefill`: a long prompt is read in pieces, unless the caller has set how.

    Each of the last tokens chooses what it reads, as those after it do: they ask the question, and among the hundreds
    of queries that share a choice they would hardly count. Where queries are scored against all keys, they are not read
    apart: their blocks of queries read everything.
    Paper: InfLLM (arXiv:2402.04617). Differs: its code reads the very last token apart.
    """

    model: PreTrainedModel
    state: Patch

    def __call__(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Read the pieces in their order; tokens follow."""
        out = self._prompt(input_ids, generation_config, model_kwargs, *args, **kwargs)
        expect(self.model, self.state.recorder, out.get(CACHE), generation_config, input_ids.device)
        return out

    def _prompt(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """What the last call gave."""
        if not self._divides(input_ids, generation_config, model_kwargs):
            return self._read([], input_ids, generation_config, model_kwargs, *args, **kwargs)
        cache, (rows, columns) = model_kwargs[CACHE], input_ids.shape
        cache.expected = columns
        if input_ids.device.type in RECORDERS and self.state.recorder.on:  # the first recorded step would grow it so
            cache.asked = min(room_after(columns + 1), max(columns, generation_config.max_length or 0))
        free = generation_config.prefill_chunk_size is None and (self.state.watch or self.state.tap) is None
        each = rows_at_once(cache, rows, columns) if free and model_kwargs.get("logits_to_keep") == 1 else rows
        try:
            if each < rows:
                return self._read_apart(each, input_ids, generation_config, model_kwargs, *args, **kwargs)
            return self._read_together(input_ids, generation_config, model_kwargs, *args, **kwargs)
        finally:
            cache.expected = 0

    def _read_apart(
        self,
        each: int,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Read some rows after the others, each prompt to its end; what the calls gave, of all rows."""
        cache, (rows, columns), facts = model_kwargs[CACHE], input_ids.shape, self.state.facts
        dtype, places = self.state.decoder.dtype, facts.places or (input_ids.device,) * len(facts.layers)
        check_room(facts, self.state.plan, cache, rows, columns, dtype, input_ids.device)
        caches, outputs = [], []
        try:
            heads = zip(facts.layers, places, strict=True)
            begin(cache, rows, [torch.empty(1, 1, 1, x.head_dim, dtype=dtype, device=place) for x, place in heads])
            for first in range(0, rows, each):
                these = slice(first, min(rows, first + each))
                caches.append(lend(cache, first, these.stop, rows))
                given = {
                    name: value[these] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
                    for name, value in model_kwargs.items()
                }
                given[CACHE] = caches[-1]
                outputs.append(self._read_together(input_ids[these], generation_config, given, *args, **kwargs))
        except BaseException:
            cache.reset()  # it holds some rows, which nobody counted
            raise
        join(cache, caches)
        self.state.ledger, self.state.cache = cache.ledger, ref(cache)
        logits = torch.cat([out.logits for out in outputs])
        return type(outputs[0])(**{**outputs[0], "logits": logits, CACHE: cache})

    def _read_together(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Read all rows, a piece of each at a time."""
        ends = self._ends(input_ids, generation_config, model_kwargs)
        return self._read(ends, input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _read(
        self,
        ends: list[int],
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Read up to each end, and then the rest; what the last call gave."""
        stock: Any = type(self.model)
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
        (rows, length), known = input_ids.shape, model_kwargs[CACHE].ledger.columns
        tail = max(known, length - TAIL) if self._shares(length, known) else length
        each = PIECE // min(rows, 4) if generation_config.prefill_chunk_size is None else length
        return [end for end in (*range(known + each, tail, each), *range(tail, length, FEW)) if end > known]

    def _shares(self, length: int, known: int) -> bool:
        """True if the last tokens would share a choice that is made by summaries of keys."""
        policies = (group.policy for layer in self.state.plan.layers for group in layer.groups)
        selectors = {p.prefill for p in policies if p.prefill is not None and p.prefill.scorer.summary is not None}
        return length - known > FEW + 1 and any(length > reads_all_to(selector) for selector in selectors)

    def _divides(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> bool:
        """True if the call is one of text alone, which can be read in pieces."""
        cache, mask = model_kwargs.get(CACHE), model_kwargs.get("attention_mask")
        known = {name for name, value in model_kwargs.items() if value is not None}
        constant = self.state.facts.longest_in_cache  # beyond it, rotary frequencies follow the length of a call
        columns = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        return (
            isinstance(cache, LongContextCache)
            and columns == input_ids.shape[1]  # the whole text, whatever the cache has of it
            and (constant is None or columns <= constant)
            and known <= _OF_TEXT
        )
