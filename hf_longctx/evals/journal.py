"""Rows on the disk as they come, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .results import meta, save_json

META = "run_meta.json"


class Journal:
    """A JSONL file of one evaluation, and its entry in the `run_meta.json` beside it.

    Args:
        out: folder, made if need be.
        name: of the evaluation: the file is `<name>.jsonl`.
        settings: what all rows share. Rows made with other settings do not go into the same file.
        device: that runs the model.
        resume: go on with the rows that are there.

    Raises:
        ValueError: there are rows and `resume` is False, or they were made with other settings, or are damaged.
    """

    def __init__(self, out: Path, name: str, settings: dict[str, Any], device: torch.device, resume: bool) -> None:
        self.path, self.rows = out / f"{name}.jsonl", []
        about = _load(out / META)
        if self.path.exists() and self.path.stat().st_size:
            if not resume:
                raise ValueError(
                    f"{name}: expected no former rows in {self.path}; got some. Pass --resume to go on with them, or "
                    "another folder."
                )
            _compare(self.path, about.get(name, {}).get("settings", {}), settings)
            self.rows = _read(self.path)
        now = meta(device, settings)
        if self.rows:
            also = {key: now[key] for key in ("date", "commit", "versions")}
            now = {**about[name], "resumed": [*about[name].get("resumed", []), also]}
        save_json(out / META, {**about, name: now})

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows; whole lines in one write, so that an interruption costs the last ones at most."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
        self.rows += rows


def _load(path: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return about


def _compare(path: Path, former: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse to mix rows of different settings, and name the first that differs."""
    for name, value in settings.items():
        if former.get(name) != value:
            raise ValueError(
                f"--resume: expected {path} to be made with {name}={value!r}; got {former.get(name)!r}. "
                "Use the same settings, another folder, or leave out --resume."
            )


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file. A last line without its end was being written at an interruption: it is cut off."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as stream:
            stream.truncate(whole)
    rows = []
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"--resume: expected a JSON object in line {number} of {path}; got {line[:60]!r}. Delete that line; "
                "its trial runs again."
            ) from error
    return rows
