"""The systems, each as a dataclass of its paper's knobs that makes a plan for a model."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from ..plan import Plan
from .auto import Auto
from .compose import compose
from .dense import Dense
from .duo_attention import DuoAttention
from .duo_heads import DuoHeads
from .fit import check_plan, check_trainable
from .inf_llm import InfLLM
from .lserve import LServe
from .method import Method
from .quest import Quest
from .shard import own_facts, own_plan
from .streaming_llm import StreamingLLM
from .streaming_vlm import StreamingVLM
from .xattention import XAttention

__all__ = [
    "METHODS",
    "Auto",
    "Dense",
    "DuoAttention",
    "DuoHeads",
    "InfLLM",
    "LServe",
    "Method",
    "Quest",
    "StreamingLLM",
    "StreamingVLM",
    "XAttention",
    "check_plan",
    "check_trainable",
    "compose",
    "make",
    "own_facts",
    "own_plan",
]

METHODS: dict[str, type[Any]] = {
    "auto": Auto,
    "dense": Dense,
    "streaming_llm": StreamingLLM,
    "duo_attention": DuoAttention,
    "quest": Quest,
    "xattention": XAttention,
    "lserve": LServe,
    "inf_llm": InfLLM,
}
"""Every method by its name; `StreamingVLM` is not among them, as `lc.stream.Session` decides what it lets go."""


def make(method: str | Method | Plan, knobs: dict[str, Any]) -> Method | Plan:
    """The method that a user named, with its knobs.

    Raises:
        ValueError: no such method, or no such knob; names the nearest.
        TypeError: knobs beside a ready-made method, or something that is no method.
    """
    if not isinstance(method, str):
        if not (isinstance(method, Plan) or hasattr(method, "plan")):
            raise TypeError(
                f"patch: expected the name of a method, a method or a Plan; got {type(method).__name__}. "
                f"Names are {', '.join(METHODS)}."
            )
        if knobs:
            raise TypeError(
                f"patch: expected no knobs beside a ready-made {type(method).__name__}; got {', '.join(sorted(knobs))}."
                " Set them when you make it."
            )
        return method
    name = method.replace("-", "_").lower()
    if name not in METHODS:
        raise ValueError(
            f"patch: expected a method among {', '.join(METHODS)}; got '{method}'.{_nearest(name, list(METHODS))}"
        )
    known = [field.name for field in dataclasses.fields(METHODS[name])]
    for knob in knobs:
        if knob not in known:
            raise ValueError(
                f"patch: expected knobs of '{name}' among {', '.join(known) or 'none'}; got '{knob}'."
                f"{_nearest(knob, known)}"
            )
    made: Method = METHODS[name](**knobs)
    return made


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f" Did you mean '{near[0]}'?" if near else ""
