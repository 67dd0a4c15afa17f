"""Head patterns: one gate per KV head, checked against a model and turned into retrieval and streaming heads.

Paper: DuoAttention, arXiv 2410.10819, section 3.
Differs: the released code breaks ties between equal gates with unseeded noise, so that two runs may keep different
heads, and takes a quantile of the gates, so that at low sparsity it may miss the wish by far. Here heads are ranked by
(gate, layer, head) and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

DEFAULT_SINK = 128
DEFAULT_WINDOW = 256


@dataclass(frozen=True)
class HeadPattern:
    """The gates of one model and the cache sizes that they were trained with.

    Args:
        name: The model's name without its organisation, or a label.
        gates: `[L][Hkv]` floats in [0, 1]; layers may differ in their number of KV heads.
        sink: First tokens that a streaming head keeps.
        window: Last tokens that a streaming head keeps.
        source: Where the gates came from, for messages; not compared.

    Raises:
        ValueError: A gate outside [0, 1] or not finite, no layer, a layer without heads, or a negative size.
    """

    name: str
    gates: tuple[tuple[float, ...], ...]
    sink: int = DEFAULT_SINK
    window: int = DEFAULT_WINDOW
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        where = self.source or f"pattern {self.name!r}"
        if not self.gates or not all(self.gates):
            raise ValueError(message(where, "gates for at least one layer and one KV head", "none", "Check the file"))
        for layer, row in enumerate(self.gates):
            for head, gate in enumerate(row):
                if not 0.0 <= gate <= 1.0:
                    here = f"{where}, layer {layer}, head {head}"
                    raise ValueError(message(here, "a gate in [0, 1]", repr(gate), "Use load_pattern, which clips"))
        check_size(self.sink, 0, f"{where}, sink")
        check_size(self.window, 1, f"{where}, window")


def check_pattern(pattern: HeadPattern, layers: int, kv_heads: int | Sequence[int]) -> None:
    """Refuse a pattern that was not made for a model of this shape.

    Args:
        pattern: The pattern.
        layers: The model's attention layers.
        kv_heads: KV heads of every layer, or of each layer in turn.

    Raises:
        ValueError: Another number of layers or heads; the message names the file and the first layer that differs.
    """
    where = pattern.source or f"pattern {pattern.name!r}"
    advice = "Use the pattern of this very model, or find its gates anew"
    if len(pattern.gates) != layers:
        raise ValueError(message(where, f"{layers} layers (lines)", f"{len(pattern.gates)}", advice))
    wanted = [kv_heads] * layers if isinstance(kv_heads, int) else list(kv_heads)
    if len(wanted) != layers:
        raise ValueError(message("kv_heads", f"one number for each of {layers} layers", f"{len(wanted)}", "Pass all"))
    for layer, (row, heads) in enumerate(zip(pattern.gates, wanted, strict=True)):
        if len(row) != heads:
            here = f"{where}, layer {layer} (line {layer + 1})"
            raise ValueError(message(here, f"{heads} KV heads (columns)", f"{len(row)}", advice))


def retrieval_heads(pattern: HeadPattern, sparsity: float) -> tuple[tuple[bool, ...], ...]:
    """Choose the heads that keep the whole context.

    Args:
        pattern: The pattern.
        sparsity: Share of all KV heads that stream, in [0, 1]; 0 keeps every head whole, 1 none.

    Returns:
        `[L][Hkv]`, True for a retrieval head. Exactly `round((1 - sparsity) * heads)` are True: those with the largest
        gates, of equal ones the first by layer and head. The same input always gives the same heads.

    Raises:
        ValueError: A sparsity outside [0, 1].
    """
    if not 0.0 <= sparsity <= 1.0:
        advice = "0.5 lets half of the KV heads stream"
        raise ValueError(message("sparsity", "a share in [0, 1]", repr(sparsity), advice))
    ranked = sorted((-gate, layer, head) for layer, row in enumerate(pattern.gates) for head, gate in enumerate(row))
    kept = {(layer, head) for _, layer, head in ranked[: round((1.0 - sparsity) * len(ranked))]}
    return tuple(tuple((layer, head) in kept for head in range(len(row))) for layer, row in enumerate(pattern.gates))


def check_size(value: object, least: int, where: str) -> int:
    """Return a whole number of tokens that is large enough."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(message(where, f"a whole number of at least {least} tokens", repr(value), "Correct the size"))
    return value


def message(where: str, expected: str, got: str, advice: str) -> str:
    """Build an error text of the package's one form."""
    return f"{where}: expected {expected}; got {got}. {advice}{'' if advice.endswith('?') else '.'}"
