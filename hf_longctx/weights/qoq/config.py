"""What `config.json` says of a QoQ model, and what `from_pretrained(..., quantization_config=...)` is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ...kernels.linear import GROUPS, LAYOUT

PER_CHANNEL = -1
PARTS = ("weight", "weight_scale", "weight_shift", "weight_groups")
"""Names of the tensors that a quantized weight consists of; of some kinds, some are not there."""


class QoQConfig(QuantizationConfigMixin):
    """Weights of 4 or 8 bits, activations of 8 bits per token; integer products.

    Given to `from_pretrained` for a checkpoint of floating-point weights, it rounds them to the nearest as they are
    loaded; `hf-longctx quantize` makes better ones from a few texts. A checkpoint that is quantized has its own.

    Paper: QServe (arXiv:2405.04532) §4.

    Args:
        wbits: bits of a weight, 4 or 8.
        group_size: input channels that share a second scale: 128, 64 or 32; -1: one scale for each output channel, as
            8 bits always have.
        modules_to_not_convert: names, or their endings, of linear layers that stay as they are, beside the output
            embedding.
        kv_bits: bits of keys and values, 4, 8 or None for the model's own: what `patch` does if its `kv` is left out.
        layout: version of the stored order; None is the current one.
        format: `omniserve`: the folder is a published QServe model, whose bits and groups its file tells (`wbits` and
            `group_size` are left out). None: as all else.

    Raises:
        ValueError: a number that is not among these.
    """

    def __init__(
        self,
        wbits: int = 4,
        group_size: int | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        kv_bits: int | None = None,
        layout: int | None = None,
        format: str | None = None,
        **other: Any,
    ) -> None:
        self.quant_method = "qoq"  # type: ignore[assignment]
        if group_size is None:
            group_size = 128 if wbits == 4 else PER_CHANNEL
        layout = LAYOUT if layout is None else layout
        unknown = ", ".join(sorted(set(other) - {"quant_method"}))
        _check("no other keys", not unknown, unknown, "Take them out; a checkpoint may be of a later version")
        _check("wbits 4 or 8", wbits in (4, 8), wbits, "Choose one of them")
        sizes = (PER_CHANNEL, *(GROUPS if wbits == 4 else ()))
        _check(f"group_size {_listed(sizes)} with {wbits} bits", group_size in sizes, group_size, "Choose one of them")
        _check("kv_bits 4, 8 or None", kv_bits in (4, 8, None), kv_bits, "Choose one of them")
        _check(f"layout {LAYOUT}", layout == LAYOUT, layout, "Quantize the model again with this version")
        _check("format 'omniserve' or None", format in ("omniserve", None), format, "Leave it out")
        if format is not None:
            self.format = format  # until the folder is read: what is saved is of our own
        self.wbits = wbits
        self.group_size = group_size
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        self.kv_bits = kv_bits
        self.layout = layout

    @property
    def kind(self) -> str:
        """`w8`, `channel` or `group`."""
        return "w8" if self.wbits == 8 else "channel" if self.group_size == PER_CHANNEL else "group"


def _listed(sizes: tuple[int, ...]) -> str:
    return " or ".join(map(str, sizes))


def _check(expected: str, holds: bool, got: Any, advice: str) -> None:
    if not holds:
        raise ValueError(f"QoQConfig: expected {expected}; got {got!r}. {advice}.")
