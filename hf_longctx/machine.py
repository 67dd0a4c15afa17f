"""What this machine's devices are called, and where it keeps files from one run to the next."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def cache_dir() -> Path:
    """Where files are kept: $HF_LONGCTX_CACHE, else $XDG_CACHE_HOME/hf_longctx, else ~/.cache/hf_longctx."""
    chosen = os.environ.get("HF_LONGCTX_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_longctx"


def device_name(device: torch.device) -> str:
    """`cpu (2 threads)`, or the name of the CUDA device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
