"""How keys and values are stored when not as the model makes them. Values; `kernels/ops.py` carries them out."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import primitive, require_whole


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

    @property
    def recent(self) -> int:
        """All tokens are read from their eight bits."""
        return 0

    def describe(self) -> str:
        """One phrase for a table."""
        return "KV int8"


@primitive
@dataclass(frozen=True)
class Int4KV:
    """Four bits a channel, asymmetric, with a scale and a zero in float16 per token and head; otherwise as `Int8KV`.

    Paper: QServe (arXiv:2405.04532) §4.2, KV4. Differs: rows of equal or nearly equal values keep their value. The
    newest tokens, to which most attention goes, may stay as they are as well (KIVI, arXiv:2402.02750 §3.2: there up to
    a whole group, here exactly those within a distance, so that any chunking still reads the same).

    Args:
        recent: a query reads keys and values less than so many tokens away as the model made them; such tokens are
            held twice. Only for heads that keep and read all.

    Raises:
        ValueError: a negative number, or none.
    """

    recent: int = 0

    def __post_init__(self) -> None:
        require_whole("Int4KV", 0, recent=self.recent)

    @property
    def bits(self) -> int:
        """Bits of a channel."""
        return 4

    def describe(self) -> str:
        """One phrase for a table."""
        return f"KV int4, the last {self.recent} tokens as they are" if self.recent else "KV int4"
