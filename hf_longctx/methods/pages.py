"""How a budget of tokens is shared out between pages that are read in any case and the best of the others."""

from __future__ import annotations

from ..plan import Selector
from ..select.budgets import TopK
from ..select.scorers import UpperBound
from ..select.summaries import MinMax


def best_pages(
    where: str, token_budget: int, summary: MinMax, sink: int, local: int, share: str, refresh_every: int
) -> Selector:
    """The pages with the highest upper bound, so many that a step reads `token_budget` tokens with the forced ones.

    The last `local` tokens touch at most `n = 1 + (local + page - 2) // page` pages, wherever the query stands in its
    own. A window of `(n - 1) * page + 1` tokens holds them and touches exactly n, so this is what is forced: the number
    of pages that a step reads never varies, and a budget as long as the text reads all of it.

    Args:
        where: for messages.
        token_budget: a whole number of pages.
        summary: pages, and the tokens behind one pair of bounds.
        sink: first tokens that are always read.
        local: last tokens that are always read.
        share: as in `Selector`, like the last.
        refresh_every: decode steps from one choice to the next.

    Raises:
        ValueError: a budget that is not whole, or has no room beside the forced pages.
    """
    page = summary.block
    Selector(UpperBound(summary), TopK(page), sink, local, share, refresh_every)  # type: ignore[arg-type]
    sink_pages, local_pages = (sink + page - 1) // page, 1 + (local + page - 2) // page
    least = (sink_pages + local_pages + 1) * page
    if type(token_budget) is not int or token_budget % page or token_budget < least:
        near = max(least, token_budget // page * page) if type(token_budget) is int else least
        raise ValueError(
            f"{where}: expected token_budget as whole pages of {page} tokens, at least {least}: {sink_pages} with "
            f"sinks, {local_pages} with the last tokens and one to choose; got {token_budget!r}. Give {near}."
        )
    take = token_budget - (sink_pages + local_pages) * page
    span = (local_pages - 1) * page + 1
    return Selector(UpperBound(summary), TopK(take), sink, span, share, refresh_every)  # type: ignore[arg-type]
