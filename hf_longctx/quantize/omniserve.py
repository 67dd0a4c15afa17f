"""From the published files of a QServe model to a folder of our own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from ..weights.qoq import omniserve
from ..weights.qoq.config import QoQConfig


def found(folder: Path) -> bool:
    """Whether a folder is such a model: `pytorch_model.bin` with quantized layers. A stale index beside it is none."""
    file = folder / omniserve.FILE
    return is_zipfile(file) and omniserve.config_of(omniserve.open_file(file)) is not None


def read(folder: Path) -> tuple[Any, Any]:
    """The model and its tokenizer, None where there is not one.

    Raises:
        ValueError: tensors that are missing, too many, of other shapes, or not those of a folded model; names them.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = QoQConfig(format="omniserve")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype="float16")
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    return model, AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
