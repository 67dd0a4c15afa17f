"""The six axes: what a value on each of them says of itself. The values live where they are carried out."""

from __future__ import annotations

from typing import Protocol, TypeVar

PRIMITIVES: dict[str, type] = {}
"""Every value of an axis, by its name."""

_T = TypeVar("_T", bound=type)


def primitive(cls: _T) -> _T:
    """Make a frozen dataclass known by its name, so that a plan that holds it survives a JSON round trip."""
    PRIMITIVES[cls.__name__] = cls
    return cls


class Retention(Protocol):
    """What stays stored, and therefore what a query may see."""

    @property
    def sink(self) -> int:
        """First tokens of each row that are never evicted."""

    @property
    def window(self) -> int | None:
        """Last tokens that stay, the newest included; None keeps all."""

    def reach(self, prompt: bool) -> int | None:
        """The window that a query sees in a prefill call, or in a decode call; None is unbounded."""

    def describe(self) -> str:
        """One phrase for a table."""


class Positions(Protocol):
    """At which position a stored key is read."""

    @property
    def in_cache(self) -> bool:
        """True: distance is counted over what is stored; False: over the text."""

    @property
    def distance(self) -> int | None:
        """The distance beyond which no key is read; None: no bound of its own."""

    @property
    def at_read(self) -> bool:
        """True: keys are stored as they are before rotation, and rotated whenever they are read."""

    def describe(self) -> str:
        """One phrase for a table."""


class Summary(Protocol):
    """What is kept beside each block of keys, so that it can be scored unread."""

    @property
    def block(self) -> int:
        """Tokens of a block."""

    @property
    def sub(self) -> int:
        """Tokens behind one entry of the summary; divides the block."""

    @property
    def local(self) -> bool:
        """True if a block is summed up once it has left the local window of every query to come."""

    @property
    def weighs(self) -> bool:
        """True if what it says follows from the attention that keys got from the queries near them."""

    def describe(self) -> str:
        """One phrase for a table."""


class Scorer(Protocol):
    """How much a block of keys matters to a query, or to a block of queries."""

    @property
    def summary(self) -> Summary | None:
        """What it reads in place of the keys; None: the keys themselves."""

    @property
    def block(self) -> int:
        """Tokens of a block of keys."""

    @property
    def q_block(self) -> int:
        """Queries of a prefill call that share a selection; a decode call selects for each token."""

    @property
    def phases(self) -> tuple[str, ...]:
        """Where it can be used: `prefill`, `decode` or both."""

    @property
    def is_mass(self) -> bool:
        """True if scores are shares of attention."""

    @property
    def clamped(self) -> bool:
        """True if it can score keys that are not read at their place in the text."""

    def describe(self) -> str:
        """One phrase for a table."""


class Budget(Protocol):
    """How many blocks are read, beside those that are forced."""

    @property
    def tokens(self) -> int | None:
        """Tokens, where the number is fixed; None: it depends on the scores."""

    @property
    def shares(self) -> tuple[float, ...] | None:
        """The share of the scores that they hold, one or one for each choice; None: the number is fixed."""

    def describe(self) -> str:
        """One phrase for a table."""


class KVFormat(Protocol):
    """How keys and values are stored."""

    @property
    def bits(self) -> int:
        """Bits of a channel."""

    @property
    def recent(self) -> int:
        """Tokens at a smaller distance from a query are read as the model made them."""

    def describe(self) -> str:
        """One phrase for a table."""


class Placement(Protocol):
    """Where keys and values are stored that are not read at every step."""

    @property
    def resident_blocks(self) -> int:
        """Blocks of the selector that stay on the device, per row and KV head."""

    @property
    def disk(self) -> str | None:
        """Folder for files that hold them; None: they are in host memory."""

    def describe(self) -> str:
        """One phrase for a table."""
