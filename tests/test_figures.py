"""Figures in tables of the README and of the documentation are those of the result files that their section names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
UNITS = {"%": 100, "MB": 1e-6, "GB": 1e-9, "MiB": 2**-20, "GiB": 2**-30}
UNSAID = (1, 2**-30)
"""As it stands in the file, or GiB of a table whose text says so: of numbers without a unit."""


def numbers(value: Any) -> Iterator[float]:
    """All numbers of a result file, but for what it says of itself."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("meta", "trials"):
                yield from numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, str):
        yield from (float(found) for found in re.findall(r"\d+(?:\.\d+)?", value))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def known(names: set[str]) -> list[float]:
    """Numbers of some result files."""
    out: list[float] = []
    for path in sorted(path for name in names for path in RESULTS.glob(name)):
        text = path.read_text()
        out += numbers(
            [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
        )
    return out


def figures(section: str) -> Iterator[tuple[str, str, str]]:
    """Numbers of two or more digits in its tables, headers and first columns aside: number, unit, and their line."""
    lines = section.splitlines()
    for above, line in pairwise(lines):
        if line.startswith("|") and above.startswith("|") and not set(line) <= set("|-: "):
            cells = "|".join(re.sub(r"`[^`]*`", "", line).split("|")[2:])
            for number, unit in re.findall(r"(?<![\w.-])(\d[\d,]*(?:\.\d+)?)\s*(%|[MG]i?B)?(?![\w])", cells):
                if len(re.sub(r"[,.]", "", number).strip("0")) > 1:
                    yield number.rstrip(","), unit, line


def sections() -> Iterator[tuple[str, str, set[str]]]:
    """Sections of pages that name result files."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for section in re.split(r"(?m)^## ", path.read_text()):
            names = set(re.findall(r"`(?:benchmarks/results/)?([\w.*-]+\.jsonl?)`", section))
            names = {name for name in names if any(RESULTS.glob(name))}
            if names and any(True for _ in figures(section)):
                yield f"{path.relative_to(ROOT)}: {section.splitlines()[0]}", section, names


def found(number: str, unit: str, among: list[float]) -> bool:
    """Whether a number is one of these, to as many digits as it has."""
    said, digits = float(number.replace(",", "")), len(number.partition(".")[2])
    half = 0.5001 * 10**-digits
    return any(abs(value * by - said) <= half for by in ((UNITS[unit], 1) if unit else UNSAID) for value in among)


SECTIONS = list(sections())


@pytest.mark.parametrize(("section", "names"), [each[1:] for each in SECTIONS], ids=[each[0] for each in SECTIONS])
def test_figures_are_those_of_the_files(section: str, names: set[str]) -> None:
    among = known(names)
    wrong = [f"{number} {unit}: {line}" for number, unit, line in figures(section) if not found(number, unit, among)]
    assert wrong == []


def test_a_figure_that_is_another_is_found() -> None:
    among = known({"passkey-64k-smollm2-h200.jsonl"})
    assert found("1,569", "MB", among)
    assert not found("1,669", "MB", among)
    assert not found("1,569", "GB", among)


def test_a_case_stands_in_one_file() -> None:
    """Of what prompts take; else an older file contradicts a newer one."""
    rows = [
        (row["case"], path.name)
        for path in RESULTS.glob("prefill*.json")
        for row in json.loads(path.read_text())["rows"]
    ]
    seen = dict(rows)
    assert [row for row in rows if seen[row[0]] != row[1]] == []
