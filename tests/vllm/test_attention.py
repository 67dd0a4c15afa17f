"""The backend on vLLM's own kernels, a step at a time: rows read what the reference chooses, or all they have."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_longctx.kernels import ops
from hf_longctx.select.choose import choose, forced
from hf_longctx.select.scorers import Look
from hf_longctx.vllm.bounds import Ledger
from hf_longctx.vllm.settings import HeadChoice, PageChoice, Roles

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
HEADS, GROUP, DIM, BLOCK, BLOCKS = 2, 3, 64, 32, 40
LAYER = "model.layers.5.self_attn.attn"


class Room:
    """One layer of an engine, its cache, and the true keys and values of each request."""

    def __init__(
        self, choice: PageChoice, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, roles: Roles = (True,) * HEADS
    ) -> None:
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        from hf_longctx.vllm import attention

        current_platform.import_kernels()
        self.choice, self.dtype, self.metadata, self.roles = choice, dtype, None, roles
        isa = _get_attn_isa(dtype, BLOCK, DIM)
        self.layer = SimpleNamespace(layer_name=LAYER, isa=isa, _k_scale_float=1.0, _v_scale_float=1.0)
        self.builder = self.made(attention.PageBuilder)
        vars(self.builder).update(
            selector=choice.selector(BLOCK), ledger=Ledger(choice.summary(BLOCK)), isa=isa, block_size=BLOCK
        )
        vars(self.builder).update(ends=choice.ends(BLOCK), roles=(roles,) * 6)
        vars(self.builder).update(num_kv_heads=HEADS, num_heads=HEADS * GROUP, head_dim=DIM, window_size=-1)
        vars(self.builder).update(kv_cache_dtype="auto", is_cross_attention=False, is_encoder_only_attention=False)
        self.impl = self.made(attention.PageImpl)
        vars(self.impl).update(layers=6, reason=None, bounds=None, head_size=DIM, scale=DIM**-0.5, num_kv_heads=HEADS)
        vars(self.impl).update(num_queries_per_kv=GROUP, logits_soft_cap=0, sliding_window=-1, alibi_slopes=None)
        vars(self.impl).update(sinks=None, kv_cache_dtype="auto", attn_type="decoder")
        monkeypatch.setattr(
            attention, "get_forward_context", lambda: SimpleNamespace(attn_metadata={LAYER: self.metadata})
        )
        self.cache = torch.zeros(BLOCKS, HEADS, BLOCK, 2 * DIM, dtype=dtype)
        self.free = torch.randperm(BLOCKS).tolist()
        self.tables: list[list[int]] = []
        self.truth: list[Tensor] = []

    def made(self, kind: Any) -> Any:
        out = object.__new__(kind)
        vars(out).update(choice=self.choice, dtype=self.dtype)
        return out

    def step(self, counts: list[int], prompt: list[bool]) -> tuple[Tensor, Tensor]:
        """So many new tokens of each request: queries `[T, Hq, D]`, and what comes of them."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        slots = []
        for row, count in enumerate(counts):
            if row == len(self.tables):
                self.tables.append([])
                self.truth.append(torch.zeros(2, HEADS, 0, DIM, dtype=self.dtype))
            begin = self.truth[row].shape[2]
            fresh = torch.randn(2, HEADS, count, DIM).to(self.dtype)
            self.truth[row] = torch.cat((self.truth[row], fresh), 2)
            for at in range(begin, begin + count):
                if at // BLOCK == len(self.tables[row]):
                    self.tables[row].append(self.free.pop())
                slots.append(self.tables[row][at // BLOCK] * BLOCK + at % BLOCK)
        table = torch.zeros(len(counts), 16, dtype=torch.int32)
        for row, blocks in enumerate(self.tables):
            table[row, : len(blocks)] = torch.tensor(blocks)
        starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        lengths = torch.tensor([each.shape[2] for each in self.truth], dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            num_reqs=len(counts),
            num_actual_tokens=sum(counts),
            max_query_len=max(counts),
            max_seq_len=int(lengths.max()),
            block_table_tensor=table,
            slot_mapping=torch.tensor(slots),
            is_prefilling=torch.tensor(prompt),
        )
        self.metadata = self.builder.build(0, common)
        last = [each[:, :, each.shape[2] - n :] for each, n in zip(self.truth, counts, strict=True)]
        key, value = torch.cat(last, 2).transpose(1, 2)
        self.impl.do_kv_cache_update(self.layer, key, value, self.cache, common.slot_mapping)
        q = torch.randn(sum(counts), HEADS * GROUP, DIM).to(self.dtype)
        out = torch.full_like(q, float("nan"))
        self.impl.forward(self.layer, q, key, value, self.cache, self.metadata, output=out)
        return q, out

    def expected(self, row: int, q: Tensor, chooses: bool) -> Tensor:
        """By the reference, in float32: `[T, Hq, D]` of the last tokens of a request."""
        selector, (keys, values) = self.choice.selector(BLOCK), self.truth[row].float()[:, None]
        length = keys.shape[2]
        q_pos = torch.arange(length - len(q), length)[None]
        wide, logits = q.float().transpose(0, 1)[None], ops.Logits(DIM**-0.5)
        if not chooses:
            return ops.attend_blocks(wide, keys, values, logits, ops.Visibility(), None)[0].transpose(0, 1)
        sub = self.choice.sub
        padded = torch.nn.functional.pad(keys, (0, 0, 0, -length % sub)).unflatten(2, (-1, sub))
        filled = (torch.arange(length + -length % sub) < length).view(1, 1, -1, sub)
        known = self.choice.summary(BLOCK).fold(padded, filled, None)
        near, retrieve = forced(selector, q_pos, 1), torch.tensor(self.roles)
        mine = retrieve.repeat_interleave(GROUP)
        look = Look(wide[:, mine], q_pos, keys[:, retrieve], known[:, retrieve], 1, 1.0, selector.share, None, near[0])
        out = torch.empty_like(wide)
        if retrieve.any():
            ids = choose(selector, look, near)
            assert ids.shape[-1] == min(self.choice.token_budget // BLOCK, -(-length // BLOCK))
            out[:, mine] = self.attend(wide[:, mine], keys[:, retrieve], values[:, retrieve], q_pos, ids)
        ends = self.choice.ends(BLOCK)
        if ends is not None and not retrieve.all():
            count = -(-length // BLOCK)
            ids = [block for block in range(count) if block < ends.first or block >= count - ends.last]
            said = torch.tensor(ids, dtype=torch.int32).expand(1, int((~retrieve).sum()), 1, -1)
            out[:, ~mine] = self.attend(wide[:, ~mine], keys[:, ~retrieve], values[:, ~retrieve], q_pos, said)
        return out[0].transpose(0, 1)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, q_pos: Tensor, ids: Tensor) -> Tensor:
        """Over chosen blocks, by the reference."""
        see, chosen = ops.Visibility(q_pos=q_pos), ops.Selection(ids.contiguous(), BLOCK, 1)
        return ops.attend_pages(q, keys.contiguous(), values.contiguous(), ops.Logits(DIM**-0.5), see, None, chosen)[0]


@pytest.mark.parametrize("share", ["kv_head", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_reads_what_it_should(dtype: torch.dtype, share: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(8)
    room = Room(PageChoice(128, 16, 2, share), dtype, monkeypatch)
    near = {"atol": 2e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 2e-2}

    def check(counts: list[int], prompt: list[bool], chooses: list[bool]) -> None:
        q, out = room.step(counts, prompt)
        at = 0
        for row, count in enumerate(counts):
            part = slice(at, at + count)
            torch.testing.assert_close(out[part].float(), room.expected(row, q[part], chooses[row]), **near)
            at += count

    check([150, 90], [True, True], [False, False])
    check([50, 30], [True, True], [False, False])
    for _ in range(4):
        check([1, 1], [False, False], [True, False])
    check([1, 1, 77], [False, False, True], [True, False, False])
    check([1, 9, 60], [False, False, True], [True, False, False])
    check([1, 1, 1], [False, False, False], [True, True, True])
    check([1, 1, 1], [False, False, True], [True, True, False])
    room.builder.ledger.known.zero_()
    room.impl.bounds.values.fill_(float("nan"))
    check([1, 1, 1], [False, False, False], [True, True, True])  # all bounds come from the cache
    check([1, 1, 1], [False, False, False], [True, True, True])


@pytest.mark.parametrize("share", ["kv_head", "all"])
@pytest.mark.parametrize("roles", [(True, False), (False, True), (False, False), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_heads_read_both_ends_and_the_others_choose(
    dtype: torch.dtype, roles: Roles, share: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(10)
    room = Room(HeadChoice(128, share=share, sinks=30, window=33), dtype, monkeypatch, roles)
    assert room.builder.ends.blocks == 3
    near = {"atol": 2e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 2e-2}

    def check(counts: list[int], prompt: list[bool], chooses: list[bool]) -> None:
        q, out = room.step(counts, prompt)
        parts = zip(q.split(counts), out.split(counts), chooses, strict=True)
        for row, (asked, got, yes) in enumerate(parts):
            torch.testing.assert_close(got.float(), room.expected(row, asked, yes), **near)

    check([250, 100, 40], [True] * 3, [False] * 3)
    for _ in range(3):
        check([1, 1, 1], [False] * 3, [True, True, False])  # beyond the budget; beyond both ends alone; within them
    check([1, 1, 50], [False, False, True], [True, True, False])
    check([1, 1, 1], [False] * 3, [True, True, False])
    check([1, 1, 1], [False] * 3, [True, True, False])
    check([1, 1, 30], [False, False, True], [True, True, False])
    check([1, 1, 1], [False] * 3, [True] * 3)
    assert (room.impl.bounds is None) is not any(roles)


def test_first_layers_and_refused_ones_read_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(9)
    room = Room(PageChoice(128, 16, 6), torch.float32, monkeypatch)
    room.step([200], [True])
    q, out = room.step([1], [False])
    torch.testing.assert_close(out, room.expected(0, q, False), atol=2e-6, rtol=1e-5)
    room = Room(PageChoice(128, 16, 2), torch.float32, monkeypatch)
    room.impl.reason = "a sliding window"
    room.step([200], [True])
    q, out = room.step([1], [False])
    torch.testing.assert_close(out, room.expected(0, q, False), atol=2e-6, rtol=1e-5)
    assert room.impl.bounds is None
