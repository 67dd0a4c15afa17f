"""Which steps a calibration takes, and how far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..config import PER_CHANNEL, QoQConfig


@dataclass(frozen=True)
class Recipe:
    """Knobs of the quantizer; the defaults are the published ones of Llama-3 with groups.

    Attributes:
        config: bits and groups.
        rotate: rotate the residual stream (Hadamard; norms become ones), and the values of each head.
        smooth_attention: exponent of SmoothAttention; 0: without.
        smooth_inputs: exponent of the inputs of `down`, in output smoothing; the weights' is 1 less it. None: without.
        reorder: sort the inputs of `down` by size; only with groups.
        clip: search how far a grid reaches.
        gptq: round by GPTQ; else to the nearest.
        seed: of the signs of the rotation.
    """

    config: QoQConfig
    rotate: bool = True
    smooth_attention: float = 0.5
    smooth_inputs: float | None = 0.3
    reorder: bool = True
    clip: bool = True
    gptq: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("smooth_attention", "smooth_inputs"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and 0 <= value <= 1):
                raise ValueError(f"quantize: expected {name} from 0 to 1; got {value}. Use the default, 0.5 or 0.3.")

    @property
    def reorders(self) -> bool:
        """Whether channels are sorted: without groups their order does not matter."""
        return self.reorder and self.config.group_size != PER_CHANNEL

    @property
    def about(self) -> dict[str, Any]:
        """All of it, for the report and for a resumed run."""
        rest = {name: value for name, value in vars(self).items() if name != "config"}
        return {**self.config.to_dict(), **rest}
