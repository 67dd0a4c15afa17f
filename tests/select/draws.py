"""What hypothesis draws for plans that select blocks: one strategy for each family of them, and texts to read."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

import hf_longctx as lc
from hf_longctx.cache.kv_format import Int4KV, Int8KV
from hf_longctx.cache.placement import HostLRU
from hf_longctx.cache.positions import Clamped
from hf_longctx.plan import Selector
from hf_longctx.select.budgets import Mass, TopK
from hf_longctx.select.scorers import Antidiagonal, RepresentativeDot, RepresentativeShare, UpperBound
from hf_longctx.select.summaries import Means, MinMax, Representatives
from hf_longctx.testing import tiny_llama

from ..streaming import draws

VOCABULARY = 128


def model(per_kv: int) -> LlamaForCausalLM:
    """Two layers of two KV heads, each with so many query heads."""
    heads = 2 * per_kv
    made = tiny_llama(num_attention_heads=heads, num_key_value_heads=2, hidden_size=8 * heads, vocab_size=VOCABULARY)
    return made.double()


MODELS = {per_kv: model(per_kv) for per_kv in (1, 4, 7)}

BLOCKS = st.sampled_from([4, 8, 16])
SHARES = st.sampled_from(["kv_head", "q_head", "all"])
FORMATS = st.sampled_from([Int4KV(), Int8KV()])
DENSE = lc.HeadPolicy(lc.KeepAll(), lc.Absolute())
Text = tuple[Tensor, Tensor | None, list[int]]


def tokens(rows: int, total: int, seed: int = 0) -> Tensor:
    """Token ids `[rows, total]`, none twice in a row: in the first layer equal tokens have equal keys, whose blocks
    would tie but for rounding."""
    made = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(VOCABULARY, generator=made)[:total] for _ in range(rows)])


@st.composite
def texts(draw: st.DrawFn, least: int = 10) -> Text:
    """Token ids, mask and calls: any chunks, or a prompt and decode steps of one or of some tokens.

    Every row has a token in the first call: decode steps are counted for the batch, so that a row that begins among
    them would be at another count than alone.
    """
    total = draw(st.integers(least, 60))
    if draw(st.booleans()):
        calls = draw(draws.calls(total))
    else:
        prompt, step = draw(st.integers(1, total)), draw(st.sampled_from([1, 1, 3, 8]))
        calls = [prompt, *(min(step, total - start) for start in range(prompt, total, step))]
    mask = draw(draws.padding(total))
    if mask is not None:
        mask[:, calls[0] - 1 :] = 1
    ids = tokens(1 if mask is None else len(mask), total, draw(st.integers(0, 9)))
    return ids, mask, calls


def plan(*layers: tuple[lc.HeadPolicy, ...]) -> lc.Plan:
    """A plan of layers with one policy for both KV heads, or one for each."""
    heads = {1: ((0, 1),), 2: ((0,), (1,))}
    groups = (tuple(map(lc.HeadGroup, heads[len(policies)], policies)) for policies in layers)
    return lc.Plan("drawn", tuple(map(lc.LayerPlan, groups)))


@st.composite
def top_k(draw: st.DrawFn, block: int) -> TopK:
    return TopK(block * draw(st.integers(1, 3)))


@st.composite
def upper_bounds(draw: st.DrawFn, refresh_every: int = 1) -> Selector:
    """For decode."""
    block = draw(BLOCKS)
    scorer = UpperBound(MinMax(block, draw(st.sampled_from([s for s in (2, 4, 8) if s <= block]))))
    sink, local, share = draw(st.integers(0, 9)), draw(st.integers(1, 12)), draw(SHARES)
    return Selector(scorer, draw(top_k(block)), sink, local, share, refresh_every)


@st.composite
def antidiagonals(draw: st.DrawFn, kv_heads: int = 2) -> Selector:
    """For prefill."""
    block, share = draw(BLOCKS), draw(st.sampled_from(["kv_head", "all"]))
    scorer = Antidiagonal(block, draw(st.sampled_from([2, 4])), rounded=draw(st.sampled_from(["", "fp8", "int8"])))
    taus = st.sampled_from([0.2, 0.5, 0.8, 0.95, 1.0])
    shares = taus | st.tuples(*[taus] * (kv_heads if share == "kv_head" else 1))
    budget = draw(st.builds(Mass, shares) | top_k(block))
    return Selector(scorer, budget, draw(st.integers(0, 5)), draw(st.integers(1, 12)), share)


@st.composite
def representatives(draw: st.DrawFn) -> Selector:
    """For both."""
    block = draw(BLOCKS)
    most = st.builds(Representatives, st.just(block), st.integers(1, min(4, block)))
    sub = st.sampled_from([n for n in (1, 2, 4, block) if block % n == 0])
    runs = st.builds(Means, st.just(block), sub, st.sampled_from([None, None, 8, 4]))
    summary = draw(most | runs)
    kind = draw(st.sampled_from([RepresentativeDot, RepresentativeShare]))
    scorer = kind(summary, draw(st.sampled_from([4, 6, 8])))
    sink, local, share = draw(st.integers(0, 9)), draw(st.integers(1, 12)), draw(st.sampled_from(["kv_head", "all"]))
    return Selector(scorer, draw(top_k(block)), sink, local, share, draw(st.sampled_from([1, 1, 3])))


@st.composite
def quest(draw: st.DrawFn) -> lc.Plan:
    """The first layer dense; in the second a decode token reads the blocks with the best bounds."""
    return plan((DENSE,), (replace(DENSE, decode=draw(upper_bounds())),))


@st.composite
def xattention(draw: st.DrawFn, per_kv: int) -> lc.Plan:
    """A prompt reads blocks by their antidiagonals, each query head with a share of its own or all with one."""
    selector = draw(antidiagonals())
    if draw(st.booleans()):
        each = st.tuples(*[st.sampled_from([0.3, 0.6, 0.9])] * (2 * per_kv))
        selector = replace(selector, budget=Mass(draw(each)), share="q_head")
    return plan(*[(replace(DENSE, prefill=selector),)] * 2)


@st.composite
def inf_llm(draw: st.DrawFn) -> lc.Plan:
    """Far keys at the edge of the window or at their places; blocks by representatives, in host memory or not."""
    selector = draw(representatives())
    far = draw(st.builds(Clamped, st.integers(1, 12)) | st.just(lc.Absolute()))
    policy = lc.HeadPolicy(lc.KeepAll(), far, selector, selector, draw(st.none() | FORMATS))
    if draw(st.booleans()):
        policy = replace(policy, placement=HostLRU(draw(st.sampled_from([0, 2, 64]))))
    return plan((policy,), (policy,))


WINDOWS = st.builds(
    lambda sink, window, more: lc.SinkWindow(sink, window, window + more),
    st.integers(0, 4),
    st.integers(1, 12),
    st.integers(0, 20),
)


@st.composite
def lserve(draw: st.DrawFn) -> lc.Plan:
    """One KV head retrieves, choosing every fourth step, the other streams; stored in few bits."""
    kv = draw(FORMATS)
    retrieval = replace(DENSE, decode=draw(upper_bounds(refresh_every=4)), kv=kv)
    streaming = lc.HeadPolicy(draw(WINDOWS), lc.Absolute(), kv=kv)
    return plan((retrieval, streaming), (streaming, retrieval))


@st.composite
def combined(draw: st.DrawFn) -> lc.Plan:
    """What nobody has shipped: all of it at once, with positions of the text."""
    prefill, decode = draw(antidiagonals(kv_heads=1)), draw(upper_bounds(draw(st.sampled_from([1, 2, 5]))))
    retrieval = replace(DENSE, prefill=prefill, decode=decode, kv=draw(st.none() | FORMATS))
    if decode.share != "q_head" and draw(st.booleans()):
        retrieval = replace(retrieval, placement=HostLRU(draw(st.sampled_from([0, 2, 64]))))
    streaming = lc.HeadPolicy(draw(WINDOWS), lc.Absolute(), kv=draw(st.none() | FORMATS))
    return plan((retrieval, streaming), (retrieval, DENSE))


@st.composite
def combined_near(draw: st.DrawFn) -> lc.Plan:
    """The same with small positions: representatives beside heads that count in the cache."""
    selector = draw(representatives())
    far = Clamped(draw(st.integers(1, 12)))
    retrieval = lc.HeadPolicy(lc.KeepAll(), far, selector, selector, draw(st.none() | FORMATS))
    streaming = lc.HeadPolicy(draw(WINDOWS), lc.InCache(), kv=draw(st.none() | FORMATS))
    return plan((streaming, retrieval), (retrieval, replace(DENSE, positions=far)))
