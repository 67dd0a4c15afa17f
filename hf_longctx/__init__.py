"""Long contexts for transformers models: `patch(model, method)`, and `generate()` runs in bounded memory."""

from .cache.cache import LongContextCache
from .cache.kv_format import Int4KV, Int8KV
from .cache.placement import HostLRU
from .cache.positions import Absolute, Clamped, InCache
from .cache.retention import KeepAll, SinkWindow
from .errors import UnsupportedError
from .kernels.dispatch import use_backend
from .methods import Dense, DuoAttention, DuoHeads, InfLLM, LServe, Quest, StreamingLLM, XAttention
from .patch import evict, patch, patched, unpatch
from .plan import HeadGroup, HeadPolicy, LayerPlan, Plan, Selector
from .report import Report, Support, report, supports

__version__ = "0.1.0"

__all__ = [
    "Absolute",
    "Clamped",
    "Dense",
    "DuoAttention",
    "DuoHeads",
    "HeadGroup",
    "HeadPolicy",
    "HostLRU",
    "InCache",
    "InfLLM",
    "Int4KV",
    "Int8KV",
    "KeepAll",
    "LServe",
    "LayerPlan",
    "LongContextCache",
    "Plan",
    "Quest",
    "Report",
    "Selector",
    "SinkWindow",
    "StreamingLLM",
    "Support",
    "UnsupportedError",
    "XAttention",
    "evict",
    "patch",
    "patched",
    "report",
    "supports",
    "unpatch",
    "use_backend",
]
