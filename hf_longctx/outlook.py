"""`plan(model, context=...)`: what every method would hold, whether it fits, which to take; before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .cache.placement import size_bytes
from .errors import UnsupportedError
from .forecast import Forecast, forecast, work_bytes
from .memory import available_beside, available_bytes, dense_kv_bytes
from .methods import METHODS, Auto, check_plan
from .methods.fitting import first_that_fits
from .models import ModelFacts, decoder_of, inspect_model
from .plan import require_whole
from .tune.crossover import CANDIDATES, cached_path, read_crossover
from .weights.bitdelta.attach import device_bytes

_GIB = 2**30


@dataclass(frozen=True)
class Outlook:
    """A model at a context, under every method.

    Args:
        model: its name.
        context: tokens of each row.
        batch: rows.
        device: what `memory` is of; empty: of one that was described.
        memory: bytes that are there for weights and all else.
        weights: bytes of the parameters and buffers, and of tenants of one-bit deltas.
        unpatched: bytes at the most without `patch`, which reads a prompt in one call.
        rows: what each method would hold, and read in a decode step.
        refused: methods that the model does not support, and why.
        measured: from which length on a method was faster on this device; empty: nobody measured it.
        recommended: what to give to `patch`; None: nothing fits.
        why: it, or why nothing fits.
    """

    model: str
    context: int
    batch: int
    device: str
    memory: int
    weights: int
    unpatched: int
    rows: dict[str, Forecast]
    refused: dict[str, str]
    measured: dict[str, int | None]
    recommended: str | None
    why: str

    def peak(self, method: str) -> int:
        """Most bytes on the device, weights included."""
        return self.weights + self.rows[method].beside_weights

    def fits(self, method: str) -> bool:
        """True if the device has them."""
        return self.peak(method) <= self.memory

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values that JSON can hold, with each method's peak and whether it fits."""
        rows = {
            name: {**asdict(row), "peak": self.peak(name), "fits": self.fits(name)} for name, row in self.rows.items()
        }
        return {**asdict(self), "rows": rows}

    def __str__(self) -> str:
        name = Path(self.model).name if Path(self.model).is_absolute() else self.model or "model"
        rows = f" in {self.batch} rows" if self.batch > 1 else ""
        where = self.device and f" on {self.device}"
        lines = [
            f"{name}: {self.context:,} tokens{rows}, {self.memory / _GIB:,.2f} GiB{where}",
            f"{'GiB':<14}{'weights':>9}{'KV':>9}{'host':>9}{'peak':>9}  {'fits':<5}{'a step reads':>13}  faster from",
            f"{'(unpatched)':<14}{self._cells(self.unpatched, None)}",
        ]
        lines += [f"{name:<14}{self._cells(self.peak(name), name)}" for name in self.rows]
        lines += [f"{name:<14} no. {why}" for name, why in self.refused.items()]
        said = f"patch(model, {self._call()})" if self.recommended else "nothing fits"
        return "\n".join([*lines, f"recommended: {said}", f"  {self.why}"])

    def _cells(self, peak: int, name: str | None) -> str:
        """A row of the table, its name aside."""
        row = None if name is None else self.rows[name]
        sizes = [self.weights, *((None, None) if row is None else (row.kv, row.host)), peak]
        shown = "".join(f"{'' if size is None else f'{size / _GIB:,.2f}':>9}" for size in sizes)
        fits = "yes" if peak <= self.memory else "no"
        if name is None or row is None:
            return f"{shown}  {fits:<5}".rstrip()
        return f"{shown}  {fits:<5}{(self.weights + row.reads) / _GIB:>13,.2f}  {self._since(name, row)}"

    def _since(self, name: str, row: Forecast) -> str:
        if name in self.measured:
            first = self.measured[name]
            return f"{first:,} (measured)" if first else "never (measured)"
        return f"{row.less_from:,} (by bytes)" if row.less_from else "-"

    def _call(self) -> str:
        name, comma, knobs = str(self.recommended).partition(",")
        return f'"{name}"{comma}{knobs}'


def plan(model: PreTrainedModel, context: int = 131072, batch: int = 1, memory: int | str | None = None) -> Outlook:
    """What every method would hold at a context, whether that fits, and which one `patch(model, "auto")` would take.

    Nothing is computed and nothing changed. The model may lie on the `meta` device, where it has shapes alone:
    `with torch.device("meta"): model = AutoModelForCausalLM.from_config(config)`.

    Args:
        model: a decoder from transformers, patched or not.
        context: tokens that each row has in the end, prompt and answer.
        batch: rows.
        memory: of the device that is meant, in bytes or as "24GiB"; None: what is free on the model's device, and what
            its weights take there (of a model on `meta`: on the GPU if there is one, else the CPU).

    Raises:
        ValueError: a context, batch or memory that makes no sense.
        UnsupportedError: no method can take this model, or processes share it; says why.
    """
    require_whole("plan", context=context, batch=batch)
    facts = inspect_model(model)
    if facts.ranks > 1:
        raise UnsupportedError(
            f"plan: expected a whole model; got one over {facts.ranks} processes, each of which holds a part. Ask of "
            "the same model on the meta device, with the memory of all processes together."
        )
    weights = weight_bytes(model)
    device, there = _memory(facts, weights, memory)
    rows, refused = {}, {}
    for name, method in METHODS.items():
        try:
            made = method().plan(facts)
            check_plan(made, facts, "plan")
            rows[name] = forecast(facts, made, context, batch)
        except (UnsupportedError, ValueError) as error:
            refused[name] = str(error)
    try:
        best = first_that_fits(facts, Auto(), context, batch, there - weights)
        recommended, why = best.call, best.why
    except MemoryError as error:
        recommended, why = None, str(error)
    dtype = decoder_of(model)[0].dtype
    whole = weights + dense_kv_bytes(facts, batch, context, dtype) + work_bytes(facts, batch * context, dtype)
    measured = _measured(facts)
    return Outlook(facts.name, context, batch, device, there, weights, whole, rows, refused, measured, recommended, why)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model's parameters and buffers, shared ones once, and of the tenants that hang on it."""
    each = {id(x): x for x in chain(model.parameters(), model.buffers())}
    return sum(x.nbytes for whole in each.values() for x in _parts(whole)) + device_bytes(model)


def _parts(x: Any) -> Iterator[torch.Tensor]:
    """The tensors that one consists of, as quantized ones of other libraries do: itself, where it is a plain one."""
    if not hasattr(x, "__tensor_flatten__"):
        yield x
        return
    for name in x.__tensor_flatten__()[0]:
        yield from _parts(getattr(x, name))


def _memory(facts: ModelFacts, weights: int, given: int | str | None) -> tuple[str, int]:
    """Whose memory, and how much for weights and all else."""
    if given is not None:
        return "", size_bytes(given, "plan: expected memory")
    if facts.place.type == "meta":
        place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return str(place), available_bytes(place)
    return facts.device, available_beside(facts) + weights


def _measured(facts: ModelFacts) -> dict[str, int | None]:
    """What `hf-longctx tune crossover` found on this device, if somebody ran it."""
    kept = cached_path(facts.family, facts.device, facts.dtype)
    if not kept.is_file():
        return {}
    found = read_crossover(kept)
    return {name: found.faster_from(name) for name in CANDIDATES}
