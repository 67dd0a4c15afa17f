"""Tells transformers of our quantizers once it is there, without loading it: checkpoints then find them."""

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

_QOQ = "qoq"


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
    """Have `quant_method: "qoq"` known to transformers, now or as soon as it is imported. Loads nothing by itself."""
    tables = sys.modules.get(_AUTO)
    if tables is not None and hasattr(tables, "register_quantizer"):
        _register(tables)
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _register(tables: Any) -> None:
    """Add our rows; a reload of the package finds them there already."""
    if _QOQ in tables.AUTO_QUANTIZER_MAPPING:
        return
    config = import_module(".qoq.config", __package__).QoQConfig
    quantizer = import_module(".qoq.quantizer", __package__).QoQQuantizer
    tables.register_quantization_config(_QOQ)(config)
    tables.register_quantizer(_QOQ)(quantizer)
