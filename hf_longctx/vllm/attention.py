"""vLLM's CPU attention, except that decode steps of long contexts read chosen blocks. Only vLLM imports this."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as kernels
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from ..errors import UnsupportedError
from .bounds import BlockBounds, Ledger, Writing
from .order import find_order
from .rows import DecodeRows, decode_rows, lengths_apart, rows_that_choose, tables_apart
from .settings import PageChoice, Roles, asked

_log = init_logger("vllm.hf_longctx")


@dataclass
class PageMetadata(CPUAttentionMetadata):  # type: ignore[misc]  # vLLM's classes are not known where it is not installed
    """What vLLM's kernels need for all rows, and of those that choose: their blocks and how many tokens they read."""

    roles: tuple[Roles, ...] = ()
    writing: Writing | None = None
    unknown: tuple[Tensor, Tensor] | None = None
    rows: DecodeRows | None = None
    reading: Callable[[Roles], CPUAttentionMetadata] | None = None
    others: tuple[Tensor, CPUAttentionMetadata] | None = None


class PageBuilder(CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """Sorts the rows of each step into those that choose and the others, once for all layers."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.choice = _asked()
        self.selector, self.ends = self.choice.selector(self.block_size), self.choice.ends(self.block_size)
        self.roles = self._roles()
        _log.info_once("%s: %s, blocks of %d", self.choice.variable, self.choice, self.block_size)
        self.ledger = Ledger(self.choice.summary(self.block_size))

    def _roles(self) -> tuple[Roles, ...]:
        """Of each layer's heads; errors as `HeadChoice.roles`, and for several processes that share heads."""
        model, ranks = self.vllm_config.model_config, self.vllm_config.parallel_config.tensor_parallel_size
        if self.ends is not None and ranks > 1:
            raise UnsupportedError(
                f"{self.choice.variable}: expected heads that are whole on a device; got tensor parallelism over "
                f"{ranks}. Serve with --tensor-parallel-size 1."
            )
        return self.choice.roles(model.hf_text_config, model.model, self.num_kv_heads)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> PageMetadata:
        """For each step of the engine."""
        common = common_attn_metadata
        made = super().build(common_prefix_len, common, fast_build)
        out = PageMetadata(**{field.name: getattr(made, field.name) for field in fields(made)}, roles=self.roles)
        if made.encoder_cache is not None:
            return out
        out.writing = self.ledger.write(made.slot_mapping)
        if made.causal is not True or common.is_prefilling is None:
            return out
        count = common.num_reqs
        starts, lengths = made.query_start_loc[: count + 1], made.seq_lens[:count]
        chosen = rows_that_choose(self.selector, self.ends, starts, lengths, common.is_prefilling[:count])
        if len(chosen) == 0:
            return out
        out.rows = decode_rows(self.selector, chosen, starts, lengths, made.block_table)
        out.unknown = self.ledger.unknown(out.rows.table, out.rows.lengths)
        out.reading = cache(partial(self._reading, out.rows))
        if len(chosen) < count:
            out.others = self._others(chosen, common)
        return out

    def _reading(self, rows: DecodeRows, roles: Roles) -> CPUAttentionMetadata:
        """For the kernel: a row for each KV head of these; without any, one for all heads."""
        lengths, apart = lengths_apart(rows, roles or (True,), self.ends), len(roles) or 1
        starts = torch.arange(len(lengths) + 1, dtype=torch.int32)
        plan = kernels.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths),
            num_heads=self.num_heads // apart,
            num_kv_heads=self.num_kv_heads // apart,
            head_dim=self.head_dim,
            seq_lens=lengths,
            dtype=self.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
        )
        longest, none = int(lengths.max()), lengths.new_empty(0)
        return CPUAttentionMetadata(len(lengths), 1, starts, longest, lengths, none, none, plan)

    def _others(self, chosen: Tensor, common: Any) -> tuple[Tensor, CPUAttentionMetadata]:
        """Tokens of the rows that do not choose, and the metadata of a batch without the others."""
        left = torch.ones(common.num_reqs, dtype=torch.bool)
        left[chosen] = False
        starts, sizes = common.query_start_loc[: common.num_reqs + 1], common.query_start_loc.diff()[: common.num_reqs]
        tokens = left.repeat_interleave(sizes.long()).nonzero()[:, 0]
        batch = replace(
            common,
            query_start_loc=torch.cat((starts[:1], sizes[left].cumsum(0, dtype=starts.dtype))),
            seq_lens=common.seq_lens[: common.num_reqs][left],
            num_reqs=int(left.sum()),
            num_actual_tokens=len(tokens),
            block_table_tensor=common.block_table_tensor[: common.num_reqs][left],
        )
        return tokens, super().build(0, batch)


class PageImpl(CPUAttentionBackendImpl):  # type: ignore[misc]
    """Attention of one layer."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.choice = _asked()
        self.bounds: BlockBounds | None = None
        self.layers = int(get_current_vllm_config().model_config.hf_text_config.num_hidden_layers)
        self._read_all(self._reason())

    def _reason(self) -> str | None:
        """Why this layer reads everything, or None."""
        facts = {
            "attention that is not a decoder's": self.attn_type != AttentionType.DECODER,
            "a sliding window": self.sliding_window != -1,
            "ALiBi": self.alibi_slopes is not None,
            "learned sinks": self.sinks is not None,
            "a quantized KV cache": self.is_fp8_kv_cache,
            "another layer's KV cache": self.kv_sharing_target_layer_name is not None,
            "a KV connector, which writes blocks unseen": get_current_vllm_config().kv_transfer_config is not None,
        }
        return next((reason for reason, holds in facts.items() if holds), None)

    def chooses(self, layer: Any, kv_cache: Tensor) -> bool:
        """Whether this layer is one that ever chooses."""
        if self.reason is None and not kv_cache.is_contiguous():
            self._read_all("blocks that lie apart")
        layers = range(self.choice.dense_layers, self.layers)  # beyond: those of a model that drafts tokens
        return self.reason is None and extract_layer_index(layer.layer_name) in layers

    def _read_all(self, reason: str | None) -> None:
        self.reason = reason
        if reason is not None:
            _log.warning_once("%s: layers with %s read everything.", self.choice.variable, reason)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write keys and values, and widen the bounds."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        known = get_forward_context().attn_metadata
        found = (known[0] if isinstance(known, list) else known or {}).get(layer.layer_name)
        if self.chooses(layer, kv_cache) and isinstance(found, PageMetadata) and found.writing is not None:
            roles = _of(layer, found)
            if any(roles):
                self._bounds_of(kv_cache, roles).write(key[:, torch.tensor(roles)], found.writing)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *scales: Any,
        **more: Any,
    ) -> Tensor:
        """`[num_tokens, num_heads, head_size]`, as vLLM's own."""
        batch = (query, key, value)
        chosen = isinstance(attn_metadata, PageMetadata) and attn_metadata.rows is not None
        if not chosen or not self.chooses(layer, kv_cache):
            return super().forward(layer, *batch, kv_cache, attn_metadata, output, *scales, **more)  # type: ignore[no-any-return]
        if attn_metadata.others is not None:
            tokens, others = attn_metadata.others
            part = output[tokens]
            super().forward(layer, *(x[tokens] for x in batch), kv_cache, others, part, *scales, **more)
            output[tokens] = part
        own = attn_metadata.rows.tokens
        at = slice(attn_metadata.num_actual_tokens) if own is None else own
        output[at] = self._read(layer, query[at], kv_cache, attn_metadata).view_as(output[at])
        return output

    def _read(self, layer: Any, q: Tensor, kv_cache: Tensor, metadata: PageMetadata) -> Tensor:
        """Attention of the rows that choose, `[R, Hq, D]`."""
        assert metadata.rows is not None and metadata.reading is not None
        count, heads, block, _ = kv_cache.shape
        roles = _of(layer, metadata)
        chosen = self._choose(layer, q, kv_cache, metadata) if any(roles) else None
        if self.choice.share == "kv_head" or not all(roles):
            cached, reading = kv_cache.view(count * heads, 1, 2 * block, -1), metadata.reading(roles)
            table = tables_apart(metadata.rows, roles, self.choice.ends(block), chosen)
            q = q.reshape(-1, self.num_queries_per_kv, self.head_size)
        else:
            assert chosen is not None
            cached, reading = kv_cache.view(count, heads, 2 * block, -1), metadata.reading(())
            table, q = chosen[:, 0].int(), q.contiguous()
        keys, values = cached.chunk(2, dim=2)
        out = torch.empty_like(q)
        kernels.cpu_attention_with_kv_cache(
            query=q,
            key_cache=keys,
            value_cache=values,
            output=out,
            query_start_loc=reading.query_start_loc,
            seq_lens=reading.seq_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=self.logits_soft_cap,
            scheduler_metadata=reading.scheduler_metadata,
            s_aux=None,
        )
        return out

    def _choose(self, layer: Any, q: Tensor, kv_cache: Tensor, metadata: PageMetadata) -> Tensor:
        """Physical blocks that the heads that retrieve read of each row, `[R, Hs, K]`."""
        assert metadata.rows is not None and metadata.unknown is not None
        roles = _of(layer, metadata)
        own = torch.tensor(roles)
        bounds, (blocks, tokens) = self._bounds_of(kv_cache, roles), metadata.unknown
        if len(blocks):
            bounds.bound(blocks, self._keys(layer, kv_cache, blocks)[:, own], tokens)
        mine = q.view(len(q), len(roles), -1, self.head_size)[:, own].flatten(1, 2)
        return metadata.rows.choose(mine, bounds.rows(metadata.rows.table))

    def _bounds_of(self, kv_cache: Tensor, roles: Roles) -> BlockBounds:
        """The bounds beside a cache, which is another one once the engine has measured the memory."""
        blocks, _, block, _ = kv_cache.shape
        if self.bounds is None or len(self.bounds.values) != blocks:
            summary = self.choice.summary(block)
            self.bounds = BlockBounds(blocks, sum(roles), self.head_size, kv_cache.dtype, summary)
        return self.bounds

    def _keys(self, layer: Any, kv_cache: Tensor, blocks: Tensor) -> Tensor:
        """Keys of whole blocks, out of the cache: `[n, Hkv, block, D]`."""
        _, heads, block, _ = kv_cache.shape
        stored = kv_cache[blocks].view(len(blocks), heads, 2, -1)[:, :, 0]
        return stored[:, :, _order(block, self.head_size, kv_cache.dtype, layer.isa)]


def _asked() -> PageChoice:
    choice = asked(os.environ)
    assert choice is not None, "registered without being asked"
    return choice


def _of(layer: Any, metadata: PageMetadata) -> Roles:
    """Roles of a layer's heads."""
    return metadata.roles[extract_layer_index(layer.layer_name)]


@lru_cache(maxsize=8)
def _order(block: int, dim: int, dtype: torch.dtype, isa: str) -> Tensor:
    """Where the kernels of an instruction set store the keys of a block."""

    def write(keys: Tensor) -> Tensor:
        pair = torch.zeros(1, 1, 2 * block, dim, dtype=dtype)
        stored, other = pair.chunk(2, dim=2)
        kernels.cpu_attn_reshape_and_cache(keys[:, None], keys[:, None], stored, other, torch.arange(block), isa)
        return stored.flatten()

    return find_order(write, block, dim, dtype)


class PageBackend(CPUAttentionBackend):  # type: ignore[misc]
    """In the place of vLLM's `CPU_ATTN`; its name stays, as vLLM looks things up by it."""

    @staticmethod
    def get_impl_cls() -> type[PageImpl]:
        """Attention."""
        return PageImpl

    @staticmethod
    def get_builder_cls() -> type[PageBuilder]:
        """Metadata."""
        return PageBuilder
