"""Which method fits on a device at a length: the first of a list that begins with those that lose least."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from ..forecast import Forecast, forecast
from ..memory import gib
from ..models import ModelFacts
from ..plan import Plan
from .duo_attention import DuoAttention
from .inf_llm import InfLLM
from .lserve import LServe
from .streaming_llm import StreamingLLM

if TYPE_CHECKING:
    from .auto import Auto


@dataclass(frozen=True)
class Fitting:
    """A method that fits.

    Args:
        call: as it would be given to `patch`.
        plan: what it does.
        size: what it will hold.
        why: this one.
    """

    call: str
    plan: Plan
    size: Forecast
    why: str


def first_that_fits(facts: ModelFacts, auto: Auto, context: int, batch: int, free: int) -> Fitting:
    """The first method that needs no more than `free` bytes beside the weights.

    Beyond the trained length, plans whose positions stay small come first: others read positions that the model has
    never seen.

    Raises:
        MemoryError: none does; says which needs least.
    """
    trained = getattr(facts.config, "max_position_embeddings", None)
    beyond = trained is not None and context > trained
    plans = sorted(_plans(facts, auto), key=lambda pair: beyond and not pair[1].bounded)
    sizes = [(call, plan, forecast(facts, plan, context, batch)) for call, plan in plans]
    asked = f"{context:,} tokens" + (f" in {batch} rows" if batch > 1 else "")
    for call, plan, size in sizes:
        if size.beside_weights <= free:
            longer = f"; trained on {trained:,} tokens, so positions stay small" if beyond and plan.bounded else ""
            said = f"{asked} need {gib(size.beside_weights)} beside the weights, {gib(free)} are there"
            return Fitting(call, plan, size, f"{call}: {said}{longer}" + (f"; {plan.why}" if plan.why else ""))
    call, _, least = min(sizes, key=lambda each: each[2].beside_weights)
    raise MemoryError(
        f"auto: expected room for {asked} of '{facts.family}'; {gib(free)} are there beside the weights, and '{call}', "
        f"which holds least, needs {gib(least.beside_weights)}. Shorten the text, or load the weights in fewer bits."
    )


def _plans(facts: ModelFacts, auto: Auto) -> Iterator[tuple[str, Plan]]:
    """Ways to patch and what they do, those that lose least first; what the model does not support is left out."""
    yield "auto", auto.fastest(facts)
    if auto.kv == "native":
        yield "auto, kv='int8'", replace(auto, kv="int8", context=None).fastest(facts)
    others: dict[str, Any] = {
        "duo_attention": DuoAttention(kv=auto.kv),
        "lserve": LServe(),
        "inf_llm": InfLLM(),
        "streaming_llm": StreamingLLM(),
    }
    for call, method in others.items():
        try:
            yield call, method.plan(facts)
        except UnsupportedError:
            continue
