"""Our quantizers are in transformers' tables, whichever of the modules is imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import hf_longctx

CODE = """
import {first}
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZER_MAPPING["qoq"].__name__ == "QoQQuantizer"
assert AUTO_QUANTIZER_MAPPING["bitdelta"].__name__ == "BitDeltaQuantizer"
assert AUTO_QUANTIZATION_CONFIG_MAPPING["qoq"].__name__ == "QoQConfig"
"""


@pytest.mark.parametrize("first", ["weights.qoq.quantizer", "weights.bitdelta.quantizer"])
def test_a_quantizer_may_be_imported_before_the_tables(first: str) -> None:
    code = CODE.format(first=f"hf_longctx.{first}")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(hf_longctx.__file__).parents[1])
