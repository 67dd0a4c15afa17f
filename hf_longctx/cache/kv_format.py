"""How keys and values are stored when not as the model makes them. Values; `kernels/ops.py` carries them out."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import primitive


@primitive
@dataclass(frozen=True)
class Int8KV:
    """Eight bits a channel, asymmetric, with a scale and a zero in float16 per token and head.

    Whatever is stored is read back from its eight bits, the tokens of the same call included, so that any chunking of
    the input gives the same output.
    """

    @property
    def bits(self) -> int:
        """Bits of a channel."""
        return 8

    def describe(self) -> str:
        """One phrase for a table."""
        return "KV int8"


@primitive
@dataclass(frozen=True)
class Int4KV:
    """Four bits a channel, asymmetric, with a scale and a zero in float16 per token and head; otherwise as `Int8KV`.

    Paper: QServe (arXiv:2405.04532) §4.2, KV4. Differs: rows of equal or nearly equal values keep their value.
    """

    @property
    def bits(self) -> int:
        """Bits of a channel."""
        return 4

    def describe(self) -> str:
        """One phrase for a table."""
        return "KV int4"
