"""What a patched model holds and does, in numbers; and which methods a model supports, with the reason of each no."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from . import shortcuts
from .errors import UnsupportedError
from .kernels import dispatch
from .memory import dense_kv_bytes
from .methods import METHODS, check_plan, own_plan
from .models import inspect_model
from .patch import state_of
from .plan import Plan


@dataclass(frozen=True)
class Support:
    """One method on one model.

    Args:
        method: its name.
        ok: True if `patch` takes it with its default knobs.
        reason: empty, or why not and what to do.
    """

    method: str
    ok: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.method}: {'yes' if self.ok else f'no. {self.reason}'}"


@dataclass(frozen=True)
class Report:
    """A patched model, in numbers.

    Args:
        method: name of the plan.
        plan: what each head does.
        kv_bytes: bytes of the last cache's live key and value tensors (of its last call, if it is gone).
        dense_kv_bytes: bytes that all tokens would take in all layers and KV heads.
        tokens_seen: columns of the batch so far, padding included.
        tokens_stored: most tokens that any head holds of a row.
        live: the cache still exists.
        backends: backend that each operation ran on last in this process.
        index_bytes: of `kv_bytes`, what is kept beside the keys so that blocks are chosen unread.
        density: share of the visible blocks that were read where heads choose; None: none has chosen yet.
        host_bytes: bytes that the cache holds in host memory or in a file beside.
        hits: chosen blocks that were on the device, where blocks lie in host memory; those read in any case aside.
        misses: chosen blocks that were brought from the host.
        hit_rate: share of hits; None: nothing lies in host memory, or no such block was read yet.
        graphs: recorded calls of the last cache.
        graph_bytes: memory on the device that they hold, beside keys and values.
        eager: why the last call of one token was not recorded; None: it was, or nothing is recorded on this device.
        norms: how many norms are one launch in calls of few tokens.
        rotations: in how many attention modules the rotation of queries and keys is.
        linears: how many linear layers have a product of their own in calls of few rows.
    """

    method: str
    plan: Plan
    kv_bytes: int
    dense_kv_bytes: int
    tokens_seen: int
    tokens_stored: int
    live: bool
    backends: dict[str, str]
    index_bytes: int = 0
    density: float | None = None
    host_bytes: int = 0
    hits: int = 0
    misses: int = 0
    hit_rate: float | None = None
    graphs: int = 0
    graph_bytes: int = 0
    eager: str | None = None
    norms: int = 0
    rotations: int = 0
    linears: int = 0

    def __str__(self) -> str:
        share = self.kv_bytes / self.dense_kv_bytes if self.dense_kv_bytes else 1.0
        backends = ", ".join(f"{op}: {backend}" for op, backend in self.backends.items()) or "none used yet"
        return (
            f"{self.plan.describe()}\n"
            f"KV cache: {self.kv_bytes / 2**20:.1f} MiB, dense {self.dense_kv_bytes / 2**20:.1f} MiB ({share:.1%})"
            f"{'' if self.live else ', released since'}"
            f"{self._offloaded()}\n"
            f"tokens: {self.tokens_seen} seen, {self.tokens_stored} stored"
            f"{'' if self.density is None else f'; {self.density:.1%} of the blocks read where heads choose'}\n"
            f"backends: {backends}"
            f"{self._recorded()}"
            f"{self._short()}"
        )

    def _recorded(self) -> str:
        """A line on recorded calls, where there are some or a reason why not."""
        if self.eager is not None:
            return f"\nno CUDA graph: {self.eager}"
        return f"\nCUDA graphs: {self.graphs}, {self.graph_bytes / 2**20:.1f} MiB" if self.graphs else ""

    def _short(self) -> str:
        """A line on short cuts, where there are some."""
        counts = {"norms": self.norms, "rotations": self.rotations, "linear layers in decode steps": self.linears}
        cuts = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        return cuts and f"\none launch each: {cuts}"

    def _offloaded(self) -> str:
        """A line on blocks in host memory, if the plan places any there."""
        if all(g.policy.placement is None for layer in self.plan.layers for g in layer.groups):
            return ""
        rate = "" if self.hit_rate is None else f" ({self.hit_rate:.1%} hits)"
        return (
            f"\noffloaded: {self.hits + self.misses} blocks read, {self.hits} hits, {self.misses} misses{rate}; "
            f"{self.kv_bytes / 2**20:.1f} MiB on the device ({self.index_bytes / 2**20:.1f} of them the index), "
            f"{self.host_bytes / 2**20:.1f} MiB on the host"
        )


def report(model: PreTrainedModel) -> Report:
    """What the patched model's last cache holds, and what dense attention would.

    Raises:
        ValueError: the model is not patched.
    """
    state = state_of(model)
    if state is None:
        raise ValueError("report: expected a patched model; got one that is not. Call hf_longctx.patch(model, ...).")
    cache = None if state.cache is None else state.cache()
    ledger = state.ledger
    chosen = ledger.hits + ledger.misses
    graphs = state.recorder.graphs(cache)
    norms, rotations, linears = shortcuts.count(state.decoder)
    return Report(
        method=state.plan.method,
        plan=state.plan,
        kv_bytes=ledger.kv_bytes if cache is None else cache.kv_bytes,
        dense_kv_bytes=dense_kv_bytes(state.facts, ledger.rows, ledger.columns + ledger.gone, state.decoder.dtype),
        tokens_seen=ledger.columns + ledger.gone,
        tokens_stored=ledger.stored,
        live=cache is not None,
        backends=dispatch.last_used(),
        index_bytes=ledger.index_bytes,
        density=ledger.density(),
        host_bytes=ledger.host_bytes,
        hits=ledger.hits,
        misses=ledger.misses,
        hit_rate=ledger.hits / chosen if chosen else None,
        graphs=len(graphs),
        graph_bytes=sum(graph.nbytes for graph in graphs),
        eager=state.recorder.reason,
        norms=norms,
        rotations=rotations,
        linears=linears,
    )


def supports(model: PreTrainedModel) -> list[Support]:
    """Which methods the model supports with their default knobs, from its configuration; nothing is changed."""
    rows = []
    for name, method in METHODS.items():
        try:
            facts = inspect_model(model)
            plan = method().plan(facts)
            check_plan(plan, facts)
            own_plan(plan, facts)
            rows.append(Support(name, True, ""))
        except (UnsupportedError, ValueError) as error:
            rows.append(Support(name, False, str(error)))
    return rows
