"""A layer of the cache that transformers sees: one store per head group."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..errors import UnsupportedError
from ..plan import HeadGroup, LayerPlan
from .ledger import Ledger
from .offload import OffloadedStore
from .store import Store
from .stores import store_for


class LongContextLayer(CacheLayerMixin):
    """One layer's stores behind the contract of transformers' cache layers."""

    is_sliding = False
    is_croppable = True
    supports_early_init = True

    def __init__(self, plan: LayerPlan, ledger: Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan = plan
        self.ledger = ledger
        self.stores: list[tuple[HeadGroup, Store | OffloadedStore]] = []
        self.recording = False
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the stores allocate when the first token comes."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the fresh tokens through: the attention function stores them, when it knows what its queries may see.

        Raises:
            TypeError: not inside a call of a patched model, which would see the fresh tokens alone.
        """
        if not self.ledger.begun:
            raise TypeError(
                "LongContextCache: expected the patched model whose plan it was made for; got a call of another, or of "
                "one that was unpatched since. Call hf_longctx.patch again, or start without this cache."
            )
        self.is_initialized = True
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the text, stored or not: masks are ours."""
        return self.ledger.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns seen, stored or not."""
        return self.ledger.columns

    def get_max_length(self) -> int:
        """No bound on what may be seen."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget everything but whether to record."""
        self.stores = [(group, store_for(group.policy)) for group in self.plan.groups]
        self.is_initialized = False
        if self.recording:
            self.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Check that the last `-tokens_to_remove` tokens can be taken back; the cache then shortens its rows."""
        for _, store in self.stores:
            store.crop(-tokens_to_remove, self.ledger.columns)
            store.kept.forget()

    def activate_past_recording(self) -> None:
        """Hold a little more than the window, so that `crop` can take tokens back."""
        self.recording = True
        for _, store in self.stores:
            store.record()

    def map_rows(self, pick: Tensor) -> None:
        """Replace the batch rows by `rows[pick]`."""
        for _, store in self.stores:
            store.map_rows(pick)

    def offload(self) -> None:
        """Refused: moving whole layers to the host and back is not what this cache is for."""
        raise UnsupportedError(
            "LongContextCache: expected to stay on its devices; got a request to offload. Leave out "
            "cache_implementation='offloaded'."
        )

    prefetch = offload
