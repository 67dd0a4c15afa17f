"""Which heads need the whole context: patterns of gates, shipped, found by model, read and written."""

from .fingerprint import find_pattern
from .pattern import HeadPattern, check_pattern, retrieval_heads
from .pattern_io import available_patterns, load_pattern, save_pattern

__all__ = [
    "HeadPattern",
    "available_patterns",
    "check_pattern",
    "find_pattern",
    "load_pattern",
    "retrieval_heads",
    "save_pattern",
]
