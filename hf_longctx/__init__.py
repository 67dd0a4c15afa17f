"""Long contexts for transformers models: `patch(model, method)`, and `generate()` runs in bounded memory.

To import the package loads nothing heavy: torch and transformers come with the first of the public names. It only sees
to it that `from_pretrained` knows our checkpoints.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .weights.registry import announce

__version__ = "0.1.0"

_HOME = {
    "Absolute": "cache.positions",
    "Antidiagonal": "select.scorers",
    "Clamped": "cache.positions",
    "Contiguous": "cache.positions",
    "Dense": "methods",
    "DuoAttention": "methods",
    "DuoHeads": "methods",
    "HeadGroup": "plan",
    "HeadPolicy": "plan",
    "HostLRU": "cache.placement",
    "InCache": "cache.positions",
    "InfLLM": "methods",
    "Int4KV": "cache.kv_format",
    "Int8KV": "cache.kv_format",
    "KeepAll": "cache.retention",
    "LServe": "methods",
    "LayerPlan": "plan",
    "LongContextCache": "cache.cache",
    "Mass": "select.budgets",
    "Means": "select.summaries",
    "ModalityWindow": "cache.retention",
    "MinMax": "select.summaries",
    "Outlook": "outlook",
    "Plan": "plan",
    "QoQConfig": "weights.qoq.config",
    "Quest": "methods",
    "Report": "report",
    "RepresentativeDot": "select.scorers",
    "RepresentativeShare": "select.scorers",
    "Representatives": "select.summaries",
    "Selector": "plan",
    "SinkWindow": "cache.retention",
    "StreamingLLM": "methods",
    "StreamingVLM": "methods",
    "Support": "report",
    "TopK": "select.budgets",
    "Trace": "trace",
    "UnsupportedError": "errors",
    "UpperBound": "select.scorers",
    "XAttention": "methods",
    "add_sink_token": "sinks",
    "evict": "patch",
    "load_session": "session",
    "patch": "patch",
    "patched": "patch",
    "plan": "outlook",
    "report": "report",
    "save_session": "session",
    "supports": "report",
    "trace": "trace",
    "unpatch": "patch",
    "use_backend": "kernels.dispatch",
}
"""Every public name, and the module that defines it; type checkers read the same below."""

_ROOMS = {"deltas", "stream"}
"""Modules that are public as they are."""

if TYPE_CHECKING:
    from . import deltas as deltas
    from . import stream as stream
    from .cache.cache import LongContextCache as LongContextCache
    from .cache.kv_format import Int4KV as Int4KV
    from .cache.kv_format import Int8KV as Int8KV
    from .cache.placement import HostLRU as HostLRU
    from .cache.positions import Absolute as Absolute
    from .cache.positions import Clamped as Clamped
    from .cache.positions import Contiguous as Contiguous
    from .cache.positions import InCache as InCache
    from .cache.retention import KeepAll as KeepAll
    from .cache.retention import ModalityWindow as ModalityWindow
    from .cache.retention import SinkWindow as SinkWindow
    from .errors import UnsupportedError as UnsupportedError
    from .kernels.dispatch import use_backend as use_backend
    from .methods import Dense as Dense
    from .methods import DuoAttention as DuoAttention
    from .methods import DuoHeads as DuoHeads
    from .methods import InfLLM as InfLLM
    from .methods import LServe as LServe
    from .methods import Quest as Quest
    from .methods import StreamingLLM as StreamingLLM
    from .methods import StreamingVLM as StreamingVLM
    from .methods import XAttention as XAttention
    from .outlook import Outlook as Outlook
    from .outlook import plan as plan
    from .patch import evict as evict
    from .patch import patch as patch
    from .patch import patched as patched
    from .patch import unpatch as unpatch
    from .plan import HeadGroup as HeadGroup
    from .plan import HeadPolicy as HeadPolicy
    from .plan import LayerPlan as LayerPlan
    from .plan import Plan as Plan
    from .plan import Selector as Selector
    from .report import Report as Report
    from .report import Support as Support
    from .report import report as report
    from .report import supports as supports
    from .select.budgets import Mass as Mass
    from .select.budgets import TopK as TopK
    from .select.scorers import Antidiagonal as Antidiagonal
    from .select.scorers import RepresentativeDot as RepresentativeDot
    from .select.scorers import RepresentativeShare as RepresentativeShare
    from .select.scorers import UpperBound as UpperBound
    from .select.summaries import Means as Means
    from .select.summaries import MinMax as MinMax
    from .select.summaries import Representatives as Representatives
    from .session import load_session as load_session
    from .session import save_session as save_session
    from .sinks import add_sink_token as add_sink_token
    from .trace import Trace as Trace
    from .trace import trace as trace
    from .weights.qoq.config import QoQConfig as QoQConfig
else:
    __all__ = [*_HOME, *_ROOMS]


class _Package(ModuleType):
    """This module: loads the public names when one is asked for, and keeps them where a module has the same name."""

    def __getattr__(self, name: str) -> Any:
        """Load all public names at once: a plan can only be read back where every primitive is known."""
        if name in _ROOMS:
            return import_module(f".{name}", __name__)
        if name not in _HOME:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'", name=name, obj=self)
        self.__dict__.update({each: getattr(import_module(f".{home}", __name__), each) for each, home in _HOME.items()})
        return self.__dict__[name]

    def __setattr__(self, name: str, value: Any) -> None:
        """Python sets a module as an attribute of its package; `patch` and `report` stay the functions."""
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """What is there, and what would be loaded."""
        return sorted({*self.__dict__, *_HOME, *_ROOMS})


sys.modules[__name__].__class__ = _Package
announce()
