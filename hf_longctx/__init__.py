"""Long contexts for transformers models: `patch(model, method)`, and `generate()` runs in bounded memory."""

from .cache.cache import LongContextCache
from .cache.positions import Absolute, InCache
from .cache.retention import KeepAll, SinkWindow
from .errors import UnsupportedError
from .kernels.dispatch import use_backend
from .methods import Dense, DuoAttention, StreamingLLM
from .patch import evict, patch, patched, unpatch
from .plan import HeadGroup, HeadPolicy, LayerPlan, Plan
from .report import Report, Support, report, supports
from .session import load_session, save_session

__version__ = "0.1.0"

__all__ = [
    "Absolute",
    "Dense",
    "DuoAttention",
    "HeadGroup",
    "HeadPolicy",
    "InCache",
    "KeepAll",
    "LayerPlan",
    "LongContextCache",
    "Plan",
    "Report",
    "SinkWindow",
    "StreamingLLM",
    "Support",
    "UnsupportedError",
    "evict",
    "load_session",
    "patch",
    "patched",
    "report",
    "save_session",
    "supports",
    "unpatch",
    "use_backend",
]
