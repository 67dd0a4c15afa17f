"""`hf-longctx bench op`: one operation on every backend and beside others, after it was found right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..errors import UnsupportedError
from ..evals.journal import Journal
from ..evals.runner import bar
from ..kernels import dispatch
from ..machine import device_name
from . import cost, stopwatch
from .operations import LONG, OPERATIONS, SMALL, Operation, Size, arguments, difference
from .rivals import rivals_of

NAME = "bench_op"
BASELINE = "torch sdpa"


@dataclass(frozen=True)
class Row:
    """One operation at one size, by one backend or rival.

    Attributes:
        name: of the operation.
        by: the backend, or who else.
        tokens: stored, or of the prompt.
        us: median time of a call in microseconds; p10 and p90 likewise.
        recorded: as in `stopwatch.Time`.
        moved_bytes: that must be read and written at least; None where products bound it.
        gb_per_s: those in the median time.
        dense_us: of torch's scaled dot products over all keys of 16 bits in the same run, where it is a baseline.
        error: why there is no time.
    """

    name: str
    by: str
    tokens: int
    us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    recorded: bool | None = None
    moved_bytes: float | None = None
    gb_per_s: float | None = None
    dense_us: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Maker:
    """Who computes: a name, and from arguments to a call."""

    by: str
    prepare: Callable[[tuple[Any, ...], Size], Callable[[], Any]]


def backends_of(one: Operation, sizes: Sequence[Size], device: torch.device) -> list[Maker]:
    """Backends that take the operation at some of the sizes; the definition alone only where no other does."""
    shorter = dict.fromkeys(replace(size, tokens=min(size.tokens, LONG)) for size in sizes)
    given = [arguments(one, size, device) for size in shorter]
    found = [_backend(one, name) for name in dispatch.ORDER if any(_takes(one, name, each) for each in given)]
    return found[:-1] or found  # the last is the reference, which takes everything


def _takes(one: Operation, backend: str, given: tuple[Any, ...]) -> bool:
    try:
        with dispatch.use_backend(backend):
            dispatch.chosen(one.op, *given)
    except UnsupportedError:
        return False
    return True


def _backend(one: Operation, backend: str) -> Maker:
    def prepare(given: tuple[Any, ...], size: Size) -> Callable[[], Any]:
        def call() -> Any:
            with dispatch.use_backend(backend):
                return one.run(given)

        return call

    return Maker(backend, prepare)


def refusal(one: Operation, maker: Maker, size: Size, device: torch.device) -> str | None:
    """What is wrong with what it gives on small sizes of this format; None: nothing, so it may be timed."""
    checked = 0
    for small in SMALL[one.name]:
        here = replace(small, dtype=size.dtype) if small.dtype == torch.bfloat16 else small
        if (small.bits if small.packed else 16) != (size.bits if size.packed else 16):
            continue
        try:
            said = difference(one, here, lambda given, here=here: maker.prepare(given, here)(), device)  # type: ignore[misc]
        except (UnsupportedError, NotImplementedError):
            continue
        if said is not None:
            return said
        checked += 1
    return None if checked else f"{one.name}: it takes none of the small sizes on which it would be checked"


def run(
    names: Sequence[str],
    sizes: Sequence[Size],
    device: torch.device,
    out: Path,
    repeats: int = 20,
    resume: bool = False,
    console: Console | None = None,
) -> list[Row]:
    """Check and time operations.

    Args:
        names: among `OPERATIONS`.
        sizes: alike but for their tokens.
        device: on which.
        out: folder for `bench_op.jsonl` and `run_meta.json`.
        repeats: rounds whose median is taken.
        resume: go on with the rows that are there; what had no time is tried again.
        console: where bar and refusals go; None shows none.

    Returns:
        A row for each; one whose result was wrong, or that ran out of memory, says so and has no time.

    Raises:
        ValueError: a name that is none, few bits for an operation that stores nothing, or rows of other settings.
    """
    console = console or Console(quiet=True)
    check(names, sizes)
    shape = {name: str(value) for name, value in asdict(sizes[0]).items() if name != "tokens"}
    settings = {"device": device_name(device), "repeats": repeats, **shape}
    journal = Journal(out, NAME, settings, device, resume)
    done = {(row.name, row.by, row.tokens): row for row in (Row(**row) for row in journal.rows) if row.error is None}
    makers = _makers(names, sizes, device, console)
    rows = []
    with bar(console) as shown, torch.no_grad():
        task = shown.add_task("", total=len(sizes) * sum(map(len, makers.values())), said="")
        for name, mine in makers.items():
            for maker in mine:
                wrong = refusal(OPERATIONS[name], maker, sizes[0], device)
                if wrong is not None:
                    console.print(f"{maker.by} is not timed: {wrong}", style="red", markup=False)
                for size in sizes:
                    shown.update(task, description=name, said=f"{maker.by}, {size.tokens:,} tokens")
                    key = name, maker.by, size.tokens
                    if key not in done:
                        row = _cell(OPERATIONS[name], maker, size, device, repeats, wrong)
                        done[key] = _beside(row, done)
                        journal.append([asdict(done[key])])
                    rows.append(done[key])
                    shown.advance(task)
    return rows


def check(names: Sequence[str], sizes: Sequence[Size]) -> None:
    """Refuse what cannot be timed.

    Raises:
        ValueError: names what.
    """
    for name in names:
        if name not in OPERATIONS:
            raise ValueError(f"bench op: expected some of {', '.join(OPERATIONS)}; got '{name}'. Name one of them.")
        if sizes[0].packed and not OPERATIONS[name].packs:
            packing = ", ".join(one.name for one in OPERATIONS.values() if one.packs)
            raise ValueError(f"--bits: expected 16 for '{name}'; got {sizes[0].bits}. Few bits are for {packing}.")
    if sizes[0].bits not in (4, 8, 16):
        raise ValueError(f"--bits: expected 16, 8 or 4; got {sizes[0].bits}.")
    if sizes[0].q_heads % sizes[0].kv_heads:
        raise ValueError(
            f"--q-heads: expected a multiple of the {sizes[0].kv_heads} KV heads; got {sizes[0].q_heads}. Change one."
        )


def _makers(
    names: Sequence[str], sizes: Sequence[Size], device: torch.device, console: Console
) -> dict[str, list[Maker]]:
    """Of every operation, rivals first, the baseline before all; those that are absent are named once."""
    found, missing = {}, []
    for name in names:
        others, absent = rivals_of(OPERATIONS[name], sizes[0], device)
        found[name] = [Maker(rival.name, rival.prepare) for rival in others]
        found[name] += backends_of(OPERATIONS[name], sizes, device)
        missing += absent
    for line in dict.fromkeys(missing):
        console.print(line, style="yellow", markup=False)
    return found


def _cell(one: Operation, maker: Maker, size: Size, device: torch.device, repeats: int, wrong: str | None) -> Row:
    """One time, or why there is none."""
    moved = one.moved(size) if one.moved else None
    row = Row(one.name, maker.by, size.tokens, moved_bytes=moved)
    if wrong is not None:
        return replace(row, error=f"not timed: {wrong}")
    try:
        many = stopwatch.copies(moved) if moved else 1
        calls = [maker.prepare(arguments(one, size, device, seed), size) for seed in range(many)]
        took = stopwatch.measure(calls, device, repeats)
        return replace(row, **vars(took), gb_per_s=moved and moved / took.us * 1e-3)
    except (RuntimeError, MemoryError, NotImplementedError) as error:
        short = cost.out_of_memory(error)
        said = " ".join(str(error).split())[:200]
        row = replace(row, error=f"{'out of memory' if short else type(error).__name__}: {said}")
    cost.free()
    return row


def _beside(row: Row, done: dict[tuple[str, str, int], Row]) -> Row:
    """The row with the baseline's time: of the same operation over all keys."""
    whole = {"attend_chosen": "attend"}.get(row.name, row.name.split("_")[0])
    base = row if row.by == BASELINE else done.get((whole, BASELINE, row.tokens))
    return replace(row, dense_us=base.us) if base is not None and base.us else row


def dtype_of(name: str) -> torch.dtype:
    """A dtype by its name; raises ValueError for what no operation takes."""
    if name not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"--dtype: expected bfloat16, float16 or float32; got '{name}'.")
    found: torch.dtype = getattr(torch, name)
    return found


def title(size: Size, device: torch.device) -> str:
    """What was measured where, in a line."""
    kind = f"{size.bits} bits" if size.packed else str(size.dtype).removeprefix("torch.")
    heads = f"{size.q_heads} query and {size.kv_heads} KV heads of {size.dim}"
    return f"{device_name(device)}: {heads}, {kind}, {size.batch} {'row' if size.batch == 1 else 'rows'}"


def table(rows: Sequence[Row], title: str) -> Table:
    """A line for each time, and each reason why there is none."""
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("operation")
    shown.add_column("by")
    for column in ("tokens", "us", "p10-p90", "GB/s", "x sdpa"):
        shown.add_column(column, justify="right", no_wrap=True)
    before = ""
    for row in rows:
        shown.add_row(row.name if row.name != before else "", row.by, f"{row.tokens:,}", *_cells(row))
        before = row.name
    return shown


def _cells(row: Row) -> Iterator[str]:
    if row.us is None or row.p10_us is None or row.p90_us is None:
        yield f"[red]{(row.error or '').split(':')[0]}[/]"
        return
    yield f"{row.us:,.1f}{' (eager)' if row.recorded is False else ''}"
    yield f"{row.p10_us:,.1f}-{row.p90_us:,.1f}"
    yield "" if row.gb_per_s is None else f"{row.gb_per_s:,.1f}"
    yield f"{row.dense_us / row.us:.2f}" if row.dense_us and row.by != BASELINE else ""
