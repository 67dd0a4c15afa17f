"""The cache that transformers sees: its contract, and the rows' lengths."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..plan import Plan, Retention
from .angles import Angles, Rotate
from .floors import floors
from .layer import LongContextLayer
from .ledger import Ledger
from .offload import OffloadedStore
from .step import Step
from .store import Store


class LongContextCache(Cache):
    """A cache for one plan. `patch` hands it out; `generate()` needs no argument.

    Args:
        plan: what each KV head does; the cache serves this plan only.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.ledger = Ledger()
        self.floors: dict[Retention, Tensor] = {}
        self.expected = 0  # columns that the calls of one prompt will come to, where it is known
        self.asked = 0  # columns for which there is room from the first call on, likewise
        self.angles = Angles() if plan.at_read else None
        self.stacks = [LongContextLayer(layer, self.ledger) for layer in plan.layers]
        super().__init__(layers=list(self.stacks))

    def begin(self, tokens: int, rows: int, device: torch.device, mask: Tensor | None, look: bool = True) -> Step:
        """The step for a call of `tokens` columns; it counts once `commit` is called. Arguments as `Step.of`.

        Raises:
            RuntimeError: the call before was interrupted, so layers may hold different tokens.
            ValueError: another batch size, or a mask that does not fit.
        """
        if self.ledger.begun:
            raise RuntimeError(
                "LongContextCache: expected every call to run to its end; got one that was interrupted, so its layers "
                "may hold different tokens. Call cache.reset() and feed the text again."
            )
        if self.ledger.columns and rows != self.ledger.rows:
            raise ValueError(
                f"LongContextCache: expected a batch of {self.ledger.rows} rows, as in the calls before; got {rows}. "
                "Use batch_repeat_interleave or batch_select_indices, or start a new cache."
            )
        self.ledger.rows = rows
        if look:
            self.ledger.settle()
        step = Step.of(self.ledger.columns, tokens, device, self.ledger.lengths, mask, look)
        known = self.expected or self.asked
        self.ledger.begun = True
        return replace(step, expected=self.expected, asked=self.asked) if known else step

    def commit(self, step: Step, looked: bool = True) -> None:
        """Count the tokens of a call that ran to its end; looked: as in `begin`, and then something may have grown.

        Raises:
            RuntimeError: a layer attended by itself.
        """
        missed = [i for i, layer in enumerate(self.stacks) if layer.handed]
        if missed:
            raise RuntimeError(
                "LongContextCache: expected every layer to attend by hf_longctx; got another attention function in "
                f"layer {missed[0]}, which saw fresh tokens alone. Patch the model as it is now, and start a new cache."
            )
        ledger = self.ledger
        ledger.tail = step.tail_after(ledger.tail)
        ledger.columns += step.tokens
        ledger.loose = ledger.loose or (not looked and ledger.lengths is None)
        ledger.lengths = step.lengths_after if step.ragged else None
        ledger.begun = False
        if looked:
            self.measure()

    def prepare(self, step: Step) -> None:
        """Let nothing move while one-token calls follow that `step` has room for."""
        for layer in self.stacks:
            for _, store in layer.stores:
                store.prepare(step)
        if self.angles is not None:
            self.angles.prepare(step)
        self.floors = {retention: floor.to(step.device) for retention, floor in self.floors.items()}
        self.measure()

    def make_room(self, step: Step) -> None:
        """Let host memory have room for a call that is recorded or replayed: that is not reserved long before."""
        grown = [store.make_room(step) for store in self.offloaded]
        if any(grown):
            self.measure()

    def buffers(self) -> list[Any]:
        """All that a recorded call reads and writes beside its inputs; what moves is another object."""
        found = [x for layer in self.stacks for _, store in layer.stores for x in store.buffers()]
        turned = [] if self.angles is None else self.angles.buffers()
        return [x for x in (*found, *turned, *self.floors.values(), *self.ledger.tally.values()) if x is not None]

    def measure(self) -> None:
        """Note in the ledger what the stores hold."""
        self.ledger.kv_bytes, self.ledger.host_bytes = self.kv_bytes, self.host_bytes
        self.ledger.lookups = [s.pool.counts for s in self.offloaded if s.pool is not None]
        self.ledger.index_bytes = sum(s.index.nbytes for layer in self.stacks for _, s in layer.stores if s.index)
        limits = [math.inf if s.limit is None else s.limit for layer in self.stacks for _, s in layer.stores]
        self.ledger.most = max(limits)

    @property
    def offloaded(self) -> list[OffloadedStore]:
        """The stores with host memory."""
        return [store for layer in self.stacks for _, store in layer.stores if isinstance(store, OffloadedStore)]

    @property
    def kv_bytes(self) -> int:
        """Bytes of all live tensors on the devices: keys, values and what is kept beside them."""
        stored = sum(store.kv_bytes for layer in self.stacks for _, store in layer.stores)
        return stored + (0 if self.angles is None else self.angles.nbytes)

    @property
    def host_bytes(self) -> int:
        """Bytes of keys and values in host memory or files."""
        return sum(store.host_bytes for layer in self.stacks for _, store in layer.stores)

    @property
    def batch_size(self) -> int:
        """Rows of the batch, -1 before the first call."""
        return self.ledger.rows or -1

    def evict(self, room: int) -> None:
        """Drop the oldest tokens outside the sinks so that the next `room` tokens push none of the rest out.

        Paper: StreamingLLM's `evict_for_space`, called before each chat turn. Differs: cannot overflow.

        Raises:
            ValueError: `room` is not between 0 and the window, or some heads keep everything.
        """
        self.floors.update(floors(self.plan, self.ledger, self.floors, room))

    def keep(self, index: Tensor, lengths: Tensor | None, shift: Tensor, rotate: Rotate) -> None:
        """Let go of all tokens but those named: of a plan that rotates keys at read, between two calls.

        Args:
            index: `[B, N]`, int64, ascending slots; of a row with fewer than N any at its end.
            lengths: `[B]`, int64, how many each row keeps; None: N.
            shift: `[B, N]`, int64, by how much each moves up.
            rotate: the model's own routine.
        """
        assert self.angles is not None and not self.ledger.begun
        for layer in self.stacks:
            for _, store in layer.stores:
                assert isinstance(store, Store)  # the plan has no placement
                store.keep(index)
        self.angles.keep(index, shift, rotate)
        ledger = self.ledger
        ledger.gone += ledger.columns - index.shape[1]
        ledger.columns, ledger.lengths, ledger.loose = index.shape[1], lengths, False
        ledger.tail = None if lengths is None else lengths.clone()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens of every row.

        Raises:
            ValueError: a positive number, more than there are, padding among them, or a window that has moved on.
        """
        remove = -int(tokens_to_remove)  # assisted decoding may pass a tensor of no dimension
        if not 0 <= remove <= self.ledger.columns:
            raise ValueError(
                f"crop: expected a number from {-self.ledger.columns} to 0 (tokens to remove, negative); got "
                f"{tokens_to_remove}. Pass minus the number of tokens to take back."
            )
        lengths = self.ledger.lengths
        tail = self.ledger.tail
        if tail is not None and remove and int(tail.min()) < remove:
            raise ValueError(
                f"crop: expected at most {int(tail.min())} tokens, as before these a row has padding; got {remove}. "
                "Crop less, or start a new cache."
            )
        super().crop(tokens_to_remove)
        for store in self.offloaded:
            store.take_back(remove, self.ledger.row_lengths)
        self.ledger.columns -= remove
        self.ledger.lengths = None if lengths is None else lengths - remove
        self.ledger.tail = None if tail is None else tail - remove
        for retention, floor in self.floors.items():  # tokens to come were never evicted
            end = self.ledger.columns if lengths is None else (lengths - remove)[:, None].to(floor.device)
            self.floors[retention] = floor.clamp(max=end)
        self.measure()

    def reset(self) -> None:
        """Forget everything, and give the memory back."""
        super().reset()  # type: ignore[no-untyped-call]
        ledger = self.ledger
        ledger.columns = ledger.gone = ledger.rows = ledger.kv_bytes = ledger.host_bytes = ledger.index_bytes = 0
        ledger.lookups = []
        ledger.lengths = ledger.tail = None
        ledger.begun = ledger.loose = False
        ledger.tally.clear()
        self.floors.clear()
        self.angles = Angles() if self.plan.at_read else None
        self.expected = self.asked = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the batch rows by `rows[beam_idx]` (beam search)."""
        self._map_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices`."""
        self._map_rows(indices if indices.dtype != torch.bool else indices.nonzero()[:, 0])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row `repeats` times."""
        self._map_rows(torch.arange(self.ledger.rows).repeat_interleave(repeats))

    def _map_rows(self, pick: Tensor) -> None:
        for layer in self.stacks:
            layer.map_rows(pick)
        if self.angles is not None:
            self.angles.map_rows(pick)
        if self.ledger.lengths is not None:
            self.ledger.lengths = self.ledger.lengths[pick.to(self.ledger.lengths.device)]
        if self.ledger.tail is not None:
            self.ledger.tail = self.ledger.tail[pick.to(self.ledger.tail.device)]
        for retention, floor in self.floors.items():
            self.floors[retention] = floor if floor.shape[0] == 1 else floor[pick.to(floor.device)]
        if self.ledger.columns:
            self.ledger.rows = int(pick.shape[0])
