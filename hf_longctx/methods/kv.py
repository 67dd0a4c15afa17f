"""The knob `kv`, which every method has."""

from __future__ import annotations

from ..cache.kv_format import Int4KV, Int8KV
from ..plan import KVFormat

_FORMATS: dict[str, KVFormat | None] = {"native": None, "int8": Int8KV(), "int4": Int4KV()}


def kv_format(kv: str | KVFormat | None, where: str) -> KVFormat | None:
    """How keys and values are stored; None: as the model makes them.

    Args:
        kv: `native`, `int8`, `int4`, a format, or None for `native`.
        where: for the message.

    Raises:
        ValueError: another name.
        TypeError: neither a name nor a format.
    """
    if kv is None:
        return None
    if isinstance(kv, str):
        if kv not in _FORMATS:
            raise ValueError(f"{where}: expected kv among {', '.join(_FORMATS)}; got '{kv}'. 'native' stores as it is.")
        return _FORMATS[kv]
    if not hasattr(kv, "bits"):
        raise TypeError(
            f"{where}: expected kv as a name ({', '.join(_FORMATS)}) or a KV format; got {type(kv).__name__}. "
            "Give for example 'int4'."
        )
    return kv
