"""Tells transformers of our quantizers once it is there, without loading it: checkpoints then name them themselves."""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

_AUTO = "transformers.quantizers.auto"
"""The module that holds transformers' tables of quantizers; `from_pretrained` cannot run before it is imported."""

METHODS = {
    "bitdelta": (".bitdelta.quantizer", "BitDeltaConfig", ".bitdelta.quantizer", "BitDeltaQuantizer"),
    "qoq": (".qoq.config", "QoQConfig", ".qoq.quantizer", "QoQQuantizer"),
}
"""By `quant_method`: module and name of the configuration, module and name of the quantizer."""


class _WhenImported(MetaPathFinder):
    """Stands before the import system until the tables are imported, and fills them right afterwards."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(_run, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _run(original: Any, module: Any) -> None:
    original(module)
    _register(module)


def announce() -> None:
    """Have our methods known to transformers, now or as soon as it is imported. Loads nothing by itself."""
    tables = sys.modules.get(_AUTO)
    if tables is not None and hasattr(tables, "register_quantizer"):
        _register(tables)
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _register(tables: Any) -> None:
    """Add our rows; a reload of the package finds them there already.

    A quantizer that is imported before the tables has them imported, and is only half there by then: it announces
    itself at its end.
    """
    for method, (settings, config, home, quantizer) in METHODS.items():
        found = getattr(import_module(home, __package__), quantizer, None)
        if found is not None and method not in tables.AUTO_QUANTIZER_MAPPING:
            tables.register_quantization_config(method)(getattr(import_module(settings, __package__), config))
            tables.register_quantizer(method)(found)
