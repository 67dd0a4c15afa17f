"""Where keys and values are stored that are not read at every step. A value; `cache/offload.py` carries it out."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from ..plan import primitive


@primitive
@dataclass(frozen=True)
class HostLRU:
    """Blocks lie in host memory; the device holds the forced ones and those that were read last.

    Paper: InfLLM (arXiv:2402.04617) §3.3. Differs: per KV head, and with a hard cap on host memory.

    Args:
        resident_blocks: blocks of the selector that stay on the device per row and KV head beside the forced ones; at
            least as many as one step reads are held.
        ram: most host memory that the whole cache may take, in bytes or as "32GiB"; None: no cap of its own.
        disk: folder for a memory-mapped file that holds the blocks in place of host memory; None: memory.

    Raises:
        ValueError: a negative number of blocks, or a size that is none.
    """

    resident_blocks: int = 32
    ram: int | str | None = None
    disk: str | None = None

    def __post_init__(self) -> None:
        if type(self.resident_blocks) is not int or self.resident_blocks < 0:
            raise ValueError(
                f"HostLRU: expected resident_blocks as a whole number >= 0; got {self.resident_blocks!r}. The paper's "
                "code keeps 32."
            )
        if self.disk is not None:
            object.__setattr__(self, "disk", os.fspath(self.disk))
        self.ram_bytes  # noqa: B018 - a size that is none is refused here, not at the first prompt

    @property
    def ram_bytes(self) -> int | None:
        """The cap in bytes."""
        return None if self.ram is None else size_bytes(self.ram, "HostLRU: expected ram")

    def describe(self) -> str:
        """One phrase for a table."""
        where = "host memory" if self.disk is None else "a file"
        return f"in {where} but for {self.resident_blocks} blocks" + ("" if self.ram is None else f" (cap {self.ram})")


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def size_bytes(size: int | str, expected: str) -> int:
    """`32GiB` as a number of bytes; a message about one that is none begins with `expected`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(size).upper())
    count = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if count < 1 or isinstance(size, bool):
        raise ValueError(f"{expected} as a number of bytes or like '32GiB'; got {size!r}. Say for example '8GiB'.")
    return count
