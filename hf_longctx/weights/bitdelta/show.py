"""What a delta takes, as a table; and bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .writing import Sizes


def table(sizes: Sizes) -> Table:
    """Bytes of each part, and the ratio with both sides counted alike."""
    made = Table(title="A delta, in bytes")
    made.add_column("part")
    made.add_column("bytes", justify="right")
    made.add_column("share", justify="right")
    for part, nbytes in sorted(sizes.parts.items(), key=lambda item: -item[1]):
        made.add_row(part, f"{nbytes:,}", f"{nbytes / max(1, sizes.nbytes):.1%}")
    made.add_section()
    made.add_row("all of it", f"{sizes.nbytes:,}", f"{sizes.ratio:.1f} times smaller")
    made.add_row("the fine-tune at 16 bits", f"{2 * sizes.weights:,}", "")
    made.add_row("of that as in the base, left out", f"{sizes.shared:,}", "")
    return made


@contextmanager
def steps_of(what: str, console: Console) -> Iterator[Callable[..., None]]:
    """A bar, told how many steps are done, of how many, and the loss where there is one."""
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as shown:
        task = shown.add_task(what, said="")

        def tell(done: int, total: int, loss: float | None = None) -> None:
            shown.update(task, completed=done, total=total, said="" if loss is None else f"loss {loss:.3g}")

        yield tell
