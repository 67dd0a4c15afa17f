"""Rows on the disk as they come, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..files import replacing
from .results import meta, save_json
from .team import Team

META = "run_meta.json"


class Journal:
    """A JSONL file of one evaluation, and its entry in the `run_meta.json` beside it.

    Args:
        out: folder, made if need be.
        name: of the evaluation: the file is `<name>.jsonl`.
        settings: what all rows share. Rows made with other settings do not go into the same file.
        device: that runs the model.
        resume: go on with the rows that are there.
        team: of this process. Each of several writes a file of its own, `<name>.part-<index>.jsonl`, until `merge`.

    Raises:
        ValueError: there are rows and `resume` is False, or they were made with other settings, or are damaged.
    """

    def __init__(
        self,
        out: Path,
        name: str,
        settings: dict[str, Any],
        device: torch.device,
        resume: bool,
        team: Team | None = None,
    ) -> None:
        self.team, self.path = team or Team(), out / f"{name}.jsonl"
        self.rows = self.team.agree(lambda: self._former(out / META, name, settings, resume))
        self._before = list(self.rows)
        if self.team.writes:
            self._begin(out / META, name, meta(device, settings))
        self.team.agree(lambda: None)  # before anybody writes rows
        self.file = self.path if self.team.count == 1 else self.path.with_suffix(f".part-{self.team.index}.jsonl")

    def _parts(self) -> list[Path]:
        """Files of processes that were interrupted."""
        return sorted(self.path.parent.glob(f"{self.path.stem}.part-*.jsonl"))

    def _former(self, about: Path, name: str, settings: dict[str, Any], resume: bool) -> list[dict[str, Any]]:
        """The rows that there are."""
        found = [path for path in (self.path, *self._parts()) if path.exists() and path.stat().st_size]
        if found and not resume:
            raise ValueError(
                f"{name}: expected no former rows in {found[0]}; got some. Pass --resume to go on with them, or "
                "another folder."
            )
        rows: list[dict[str, Any]] = []
        for path in found:
            _compare(path, _load(about).get(name, {}).get("settings", {}), settings)
            rows += [row for row in _read(path) if row not in rows]
        return rows

    def _begin(self, path: Path, name: str, now: dict[str, Any]) -> None:
        """Write what the rows to come are made with, and the rows of interrupted processes with the others."""
        about = _load(path)
        if self.rows:
            also = {key: now[key] for key in ("date", "commit", "versions")}
            now = {**about[name], "resumed": [*about[name].get("resumed", []), also]}
        save_json(path, {**about, name: now})
        if self._parts():
            self._replace()

    def _replace(self) -> None:
        """All rows in one file, in place of those of single processes."""
        with replacing(self.path) as scratch, open(scratch, "w", encoding="utf-8") as stream:
            stream.write(_lines(self.rows))
        for part in self._parts():
            part.unlink()

    def merge(self, rows: list[dict[str, Any]]) -> None:
        """Put what all processes have found into one file, in this order; no-op in a process alone."""
        if self.team.count == 1:
            return
        if self.team.writes:
            mine = {json.dumps(row, sort_keys=True) for row in rows}
            self.rows = [row for row in self._before if json.dumps(row, sort_keys=True) not in mine] + rows
            self._replace()
        self.team.agree(lambda: None)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows; whole lines in one write, so that an interruption costs the last ones at most."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(_lines(rows))
        self.rows += rows


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


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
