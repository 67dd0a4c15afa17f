"""The script that fine-tunes a tiny model with Trainer and PEFT: its loss falls, and an adapter of text is left."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

from safetensors.torch import load_file

from ..operators import needs_torchvision

pytestmark = needs_torchvision

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "stream_sft.py"


def test_the_loss_falls_and_the_tower_is_untouched(tmp_path: Path) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    out, save = tmp_path / "losses.json", tmp_path / "adapter"
    row = main(["--steps", "25", "--films", "4", "--rows", "2", "--quiet", "--out", str(out), "--save", str(save)])
    assert row["value"] < 0.6 * row["baseline_value"]
    assert json.loads(out.read_text())["rows"][0]["losses"] == row["losses"]
    adapter = load_file(save / "adapter_model.safetensors")
    assert adapter
    assert all("language_model" in name and "lora_" in name for name in adapter)
