"""Read and write head patterns in the format that DuoAttention published.

A folder with `full_attention_heads.tsv` (a line per layer, a tab separated column per KV head, no header) and
`config.json` (of which `sink_size`, `recent_size`, `deploy_*` and `model_name` are read). Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from .pattern import DEFAULT_SINK, DEFAULT_WINDOW, HeadPattern, check_size, message

GATES_FILE = "full_attention_heads.tsv"
CONFIG_FILE = "config.json"
_TOLERANCE = 0.05  # published gates dip to -0.0014, a last step without a clamp; more than this is another kind of file

Gates = Sequence[Sequence[float]]


def load_pattern(source: str | os.PathLike[str] | Gates | HeadPattern) -> HeadPattern:
    """Read a pattern from wherever it is.

    Args:
        source: A folder in the published format (or the folder above it, when it holds one such folder), a tsv file,
            the name of a shipped pattern (any case, with or without the organisation), gates `[L][Hkv]`, a pattern.
            A path that exists wins over a shipped name, unless it is a folder without a pattern in it.
            A missing `config.json` means sink 128 and window 256, the sizes of all published patterns.

    Returns:
        The pattern, gates clipped to [0, 1].

    Raises:
        FileNotFoundError: The folder holds no pattern.
        ValueError: An unknown name, or a bad file; the message names the file and the line.
        TypeError: A source of another type.
    """
    if isinstance(source, HeadPattern):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _load_named(os.fspath(source))
    return HeadPattern("custom", _clip_all(_rows_of(source), "gates", "layer", 0), source="gates")


def available_patterns() -> tuple[str, ...]:
    """Return the names of the shipped patterns, sorted."""
    return tuple(sorted(entry.name for entry in files(__package__).joinpath("patterns").iterdir() if entry.is_dir()))


def shipped_name(name: str) -> str | None:
    """Return the shipped pattern that a model's name, hub id or path means, or None.

    Args:
        name: For example `mistralai/Mistral-7B-Instruct-v0.2`, or a folder of the hub's cache.
    """
    known = {shipped.lower(): shipped for shipped in available_patterns()}
    known["llama-3.1-8b-instruct"] = "Meta-Llama-3.1-8B-Instruct"  # its name on the hub today
    parts = [part for part in name.replace("\\", "/").lower().split("/") if part]
    cached = [part.rsplit("--", 1)[-1] for part in parts if part.startswith("models--")]
    for part in (cached or parts)[-1:]:
        return known.get(part)
    return None


def save_pattern(
    pattern: HeadPattern, folder: str | os.PathLike[str], about: Mapping[str, object] | None = None
) -> None:
    """Write a pattern in the published format: `full_attention_heads.tsv` and `config.json`.

    Both files are complete on the disk before either takes the place of an old one, so a failed save (a full disk, a
    killed process) leaves the old pattern as it was. Reading it back gives the same gates, bit for bit.

    Args:
        pattern: The pattern; all layers must have the same number of KV heads.
        folder: Made if it is not there; other files in it are left alone.
        about: What else the configuration shall say, such as how the gates were trained.

    Raises:
        ValueError: Layers of different widths, which the format cannot hold.
    """
    widths = sorted({len(row) for row in pattern.gates})
    if len(widths) > 1:
        advice = "The published format is a rectangle; keep such gates in your own file"
        raise ValueError(message(f"pattern {pattern.name!r}", "equally many KV heads per layer", f"{widths}", advice))
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    config = {
        **(about or {}),
        "model_name": pattern.name,
        "sink_size": pattern.sink,
        "recent_size": pattern.window,
        "deploy_sink_size": None,
        "deploy_recent_size": None,
    }
    gates = "".join("\t".join(f"{gate:.18e}" for gate in row) + "\n" for row in pattern.gates)
    _replace_together(target, {GATES_FILE: gates, CONFIG_FILE: json.dumps(config, indent=2) + "\n"})


def _load_named(source: str) -> HeadPattern:
    """Read a path if there is one, else a shipped pattern."""
    path = Path(source)
    if path.is_file():
        return _load_file(path, path.with_name(CONFIG_FILE))
    folder = _pattern_folder(path) if path.is_dir() else None
    if folder is not None:
        return _load_file(folder / GATES_FILE, folder / CONFIG_FILE)
    name = shipped_name(source)
    if name is not None:
        return _load_shipped(name)
    if path.is_dir():
        advice = "Point at the folder that holds it"
        raise FileNotFoundError(message(source, f"a folder with {GATES_FILE}", "a folder without it", advice))
    near = get_close_matches(source.rsplit("/", 1)[-1], available_patterns(), n=1, cutoff=0.4)
    advice = f"Did you mean {near[0]!r}?" if near else f"Shipped are {', '.join(available_patterns())}"
    raise ValueError(message("pattern", "a folder, a tsv file or the name of a shipped pattern", repr(source), advice))


def _pattern_folder(path: Path) -> Path | None:
    """Return the folder with the gates: this one, or its only child with some."""
    if (path / GATES_FILE).is_file():
        return path
    inner = sorted(child for child in path.iterdir() if (child / GATES_FILE).is_file())
    if len(inner) > 1:
        found = ", ".join(child.name for child in inner)
        raise ValueError(message(str(path), "one pattern", f"{len(inner)} ({found})", "Name one of these folders"))
    return inner[0] if inner else None


def _load_file(gates: Path, config: Path) -> HeadPattern:
    """Read a tsv file and the configuration beside it, if there is one."""
    try:
        text = gates.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(message(str(gates), "tab separated numbers", "a binary file", "Check the path")) from error
    facts = _read_config(config.read_text(encoding="utf-8"), str(config)) if config.is_file() else {}
    return _build(text, facts, str(gates), gates.parent.name or gates.stem)


def _load_shipped(name: str) -> HeadPattern:
    """Read a pattern of the package."""
    folder = files(__package__).joinpath("patterns", name)
    facts = _read_config(folder.joinpath(CONFIG_FILE).read_text(encoding="utf-8"), f"{name}/{CONFIG_FILE}")
    return _build(folder.joinpath(GATES_FILE).read_text(encoding="utf-8"), facts, f"{name}/{GATES_FILE}", name)


def _build(text: str, facts: dict[str, object], where: str, fallback_name: str) -> HeadPattern:
    """Put the gates and the facts of the configuration together."""
    model = facts.get("model_name")
    name = model.rstrip("/").rsplit("/", 1)[-1] if isinstance(model, str) and model.strip("/") else fallback_name
    sink = _size(facts, "sink_size", "deploy_sink_size", DEFAULT_SINK, 0, where)
    window = _size(facts, "recent_size", "deploy_recent_size", DEFAULT_WINDOW, 1, where)
    return HeadPattern(name, _parse_gates(text, where), sink, window, source=where)


def _parse_gates(text: str, where: str) -> tuple[tuple[float, ...], ...]:
    """Turn the text of a tsv file into clipped gates `[L][Hkv]`."""
    lines = text.rstrip().splitlines()
    if not lines:
        raise ValueError(message(where, "a line of gates per layer", "an empty file", "Fetch the file again"))
    rows: list[list[float]] = []
    for number, line in enumerate(lines, start=1):
        here = f"{where}, line {number}"
        row = [_number(cell, f"{here}, column {column}") for column, cell in enumerate(line.split("\t"), start=1)]
        if rows and len(row) != len(rows[0]):
            expected, advice = f"{len(rows[0])} columns, as in line 1", "The file is cut or mixed; fetch it again"
            raise ValueError(message(here, expected, f"{len(row)}", advice))
        rows.append(row)
    return _clip_all(rows, where, "line", 1)


def _number(cell: str, where: str) -> float:
    """Read one cell."""
    try:
        return float(cell)
    except ValueError as error:
        advice = "Columns are separated by one tab, without a header"
        raise ValueError(message(where, "a number", repr(cell[:40]), advice)) from error


def _rows_of(source: object) -> list[list[float]]:
    """Turn nested sequences (or an array or tensor) into floats."""
    advice = "Pass a path, a shipped name, or gates as [layer][KV head]"
    listed = source.tolist() if hasattr(source, "tolist") else source
    if not isinstance(listed, Sequence) or not all(isinstance(row, Sequence) for row in listed):
        raise TypeError(message("pattern", "a path, a name or nested sequences of numbers", repr(source)[:60], advice))
    try:
        return [[float(gate) for gate in row] for row in listed]
    except (TypeError, ValueError) as error:
        raise TypeError(message("gates", "numbers", str(error), advice)) from error


def _clip_all(rows: list[list[float]], where: str, unit: str, first: int) -> tuple[tuple[float, ...], ...]:
    """Clip gates into [0, 1]; refuse what is not one."""
    for number, row in enumerate(rows, start=first):
        for column, gate in enumerate(row, start=first):
            here = f"{where}, {unit} {number}, {'column' if unit == 'line' else 'head'} {column}"
            if not math.isfinite(gate):
                raise ValueError(message(here, "a finite gate", repr(gate), "Its training diverged; take another file"))
            if not -_TOLERANCE <= gate <= 1.0 + _TOLERANCE:
                advice = "Gates are no logits or scores; rescale them"
                raise ValueError(message(here, f"a gate in [0, 1] (up to {_TOLERANCE} beyond)", repr(gate), advice))
    return tuple(tuple(max(0.0, min(1.0, gate)) for gate in row) for row in rows)


def _read_config(text: str, where: str) -> dict[str, object]:
    """Read `config.json`: one flat object."""
    try:
        facts = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(message(where, "a JSON object", str(error), "Mend or remove the file")) from error
    if not isinstance(facts, dict):
        raise ValueError(message(where, "a JSON object", type(facts).__name__, "Mend or remove the file"))
    return facts


def _size(facts: dict[str, object], key: str, override: str, default: int, least: int, where: str) -> int:
    """Return a size of the configuration; the deployment's wins over the training's."""
    chosen = override if facts.get(override) is not None else key
    value = facts.get(chosen)
    return check_size(default if value is None else value, least, f"{CONFIG_FILE} beside {where}, {chosen}")


def _replace_together(folder: Path, texts: dict[str, str]) -> None:
    """Write all files beside their targets, then rename them into place."""
    waiting = {folder / name: folder / f".{name}.{os.getpid()}.part" for name in texts}
    try:
        for final, part in waiting.items():
            with part.open("w", encoding="utf-8", newline="\n") as file:
                file.write(texts[final.name])
                file.flush()
                os.fsync(file.fileno())
        for final, part in waiting.items():
            os.replace(part, final)
    finally:
        for part in waiting.values():
            with contextlib.suppress(FileNotFoundError):
                part.unlink()
