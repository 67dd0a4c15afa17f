"""The definition of every operation, in plain torch; takes every argument on every device."""

from __future__ import annotations

from ..dispatch import Implementation
from .append import append
from .attend import attend_blocks, attend_pages
from .rotate import rotate

OPS = {
    "attend_blocks": Implementation(attend_blocks),
    "attend_pages": Implementation(attend_pages),
    "rotate": Implementation(rotate),
    "append": Implementation(append),
}
