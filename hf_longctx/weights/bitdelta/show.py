"""What a delta takes, as a table."""

from __future__ import annotations

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
