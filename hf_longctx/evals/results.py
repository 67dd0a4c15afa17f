"""What every measured number is stored with: versions, device, commit, settings."""

from __future__ import annotations

import json
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..doctor import versions
from ..files import replacing
from ..machine import device_name


def commit() -> str | None:
    """The commit that the package runs from, with `-dirty` if files differ from it; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or None


def meta(device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """What a reader needs to run it again."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name(device),
        "versions": versions(),
        "settings": settings,
    }


def save_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step; a failure leaves the old one."""
    with replacing(path) as scratch, open(scratch, "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1)
        stream.write("\n")
