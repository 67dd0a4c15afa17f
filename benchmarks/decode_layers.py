"""One decode step of attention, layer after layer as in a model, and the fastest dense attention to compare it with.

As many layers as there are sets of buffers stand in a row, so that none is in the L2 when its turn comes, and all run
through the package's own attention function, from fresh keys to the result. One CUDA graph holds them; its time over
the number of layers is the time of a layer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hf_longctx.attention import attention
from hf_longctx.cache.cache import LongContextCache
from hf_longctx.cache.step import Step
from hf_longctx.context import Forward
from hf_longctx.models import LayerFacts, ModelFacts

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
L2 = 192 << 20
"""Bytes that a round through all layers reads at least: several times the L2."""

LAYERS, ROOM = 32, 48 << 30
"""Layers that share what a step does once, as many as a model of 8B has; and bytes that their caches may take."""


@dataclass(frozen=True)
class Shape:
    """Rows and tokens of a cache; attention heads are those of Llama 3 8B."""

    rows: int
    tokens: int

    @property
    def bytes(self) -> int:
        """Of a layer's keys and values in 16 bits."""
        return 2 * 2 * self.rows * self.tokens * KV_HEADS * DIM


def facts(layers: int) -> ModelFacts:
    """A model of so many layers, as far as a plan asks."""
    layer = LayerFacts(Q_HEADS, KV_HEADS, DIM, None)
    place = torch.device("cuda")
    name = torch.cuda.get_device_name()
    return ModelFacts("llama", "", None, (layer,) * layers, None, None, name, "bfloat16", False, place)


def time_of(calls: Callable[[], Any], repeats: int = 15) -> float:
    """Median time of what `calls` launches, in microseconds, replayed from one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls()
        calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        calls()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        for _ in range(5):
            graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1000 / 5)
    return statistics.median(times)


def read_bandwidth() -> float:
    """Bytes per second that a sum over 4 GiB reads."""
    x = torch.zeros(1 << 30, dtype=torch.float32, device=DEVICE)
    return x.nbytes / (time_of(lambda: x.sum()) * 1e-6)


# the package -------------------------------------------------------------------------------------------------------


class Layers:
    """Filled caches of a method, one layer after the other.

    Args:
        plan_of: makes the plan for a model of that many layers.
        shape: of the cache.
        read: bytes of a layer that a step reads, about: how many layers are needed.
    """

    def __init__(self, plan_of: Callable[[ModelFacts], Any], shape: Shape, read: int) -> None:
        self.shape = shape
        self.layers = max(3, min(max(LAYERS, -(-L2 // max(read, 1))), ROOM // shape.bytes))
        self.facts = facts(self.layers)
        self.plan = plan_of(self.facts)
        self.cache = LongContextCache(self.plan)
        self.q = torch.randn(shape.rows, Q_HEADS, 1, DIM, dtype=DTYPE, device=DEVICE)
        self.k, self.v = torch.randn(2, shape.rows, KV_HEADS, 1, DIM, dtype=DTYPE, device=DEVICE)
        self.room = shape.tokens + 512
        self._fill()
        lengths = torch.full((shape.rows,), shape.tokens, device=DEVICE)
        self.step = Step(shape.tokens, 1, DEVICE, lengths, None, True, self.room)
        self.cache.prepare(self.step)

    def _fill(self) -> None:
        rows, tokens = self.shape.rows, self.shape.tokens
        before = Step.of(0, tokens, DEVICE, None, None)
        for layer in self.cache.stacks:
            for group, store in layer.stores:
                k, v = (torch.randn(rows, len(group.kv_heads), tokens, DIM, dtype=DTYPE, device=DEVICE) for _ in "kv")
                store.write(k, v, before)
        self.cache.ledger.rows, self.cache.ledger.columns = rows, tokens

    @property
    def kv_bytes(self) -> int:
        """Bytes that a layer's store holds."""
        return self.cache.kv_bytes // self.layers

    @torch.no_grad()
    def run(self, due: bool = True) -> None:
        """Every layer's decode step; due: those that choose only now and then do."""
        for layer in self.cache.stacks:
            for _, store in layer.stores:
                if due:
                    store.kept.forget()
        step = Step(self.step.columns, 1, DEVICE, self.step.lengths, None, True, self.room)
        forward = Forward(self.facts, self.plan, step, self.cache)
        for index in range(self.layers):
            module: Any = SimpleNamespace(layer_idx=index)
            attention(module, self.q, self.k, self.v, None, hf_longctx=forward)
        forward.count()

    def time(self, refresh_every: int = 1) -> float:
        """Microseconds of a layer's step, over as many steps as a choice of blocks holds."""
        chosen = time_of(self.run) / self.layers
        if refresh_every == 1:
            return chosen
        kept = time_of(lambda: self.run(False)) / self.layers
        return (chosen + (refresh_every - 1) * kept) / refresh_every


# dense attention of others -----------------------------------------------------------------------------------------


def dense_of_others(shape: Shape, fa3: bool) -> dict[str, float]:
    """Microseconds of dense attention over as many keys and values, by who computes it; who refuses is left out."""
    copies = max(2, -(-L2 // shape.bytes))
    q = torch.randn(shape.rows, Q_HEADS, 1, DIM, dtype=DTYPE, device=DEVICE)
    kv = [
        torch.randn(2, shape.rows, KV_HEADS, shape.tokens, DIM, dtype=DTYPE, device=DEVICE).unbind()
        for _ in range(copies)
    ]
    packed = q.view(shape.rows, KV_HEADS, -1, DIM)

    def of(backend: SDPBackend, x: Tensor, grouped: bool) -> Callable[[], Any]:
        def run() -> None:
            with sdpa_kernel(backend):
                for k, v in kv:
                    scaled_dot_product_attention(x, k, v, enable_gqa=grouped)

        return run

    tried: dict[str, Callable[[], Any]] = {
        "cudnn": of(SDPBackend.CUDNN_ATTENTION, q, True),
        "cudnn, heads packed": of(SDPBackend.CUDNN_ATTENTION, packed, False),
        "flash": of(SDPBackend.FLASH_ATTENTION, q, True),
        "flash, heads packed": of(SDPBackend.FLASH_ATTENTION, packed, False),
    }
    if fa3:
        tried["fa3"] = _fa3(q, kv)
    found = {}
    for name, run in tried.items():
        try:
            found[name] = time_of(run) / copies
        except RuntimeError as error:
            print(f"dense, {name}: {str(error).splitlines()[0]}")
    return found


def _fa3(q: Tensor, kv: list[Any]) -> Callable[[], Any]:
    q = q.transpose(1, 2).contiguous()
    moved = [[x.transpose(1, 2).contiguous() for x in both] for both in kv]
    return lambda: [torch.ops.flash_attn_3.fwd(q, k, v, softmax_scale=DIM**-0.5, is_causal=False) for k, v in moved]
