"""A cell of the table, method x length, as a line of the JSONL file; and from which length on a method is faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from .cost import Cost

BASELINE = "dense"

_LESS = 0.97
"""A method is faster if it takes at most this share of the time: less may be chance, whatever the runs say."""


@dataclass(frozen=True)
class Row:
    """One method at one length. Times are those of the whole batch, bytes of all its rows.

    Attributes:
        method: name of the choice, knobs included, or of a peer.
        length: tokens of a prompt.
        batch: prompts that ran together.
        tokens: decode steps that were counted in each run.
        prefill_s: median of the runs, from where the prompt begins to be read to the first new token.
        prefill_runs_s: of each run.
        ttft_s: median of the runs, from the call to the first new token.
        token_ms: median of all steps of all runs; p10 and p90 likewise.
        tokens_per_s: of the batch, by the median.
        kv_bytes: on the device at the end.
        host_bytes: beside it.
        kv_share: of what dense would hold, or None where nobody says what that is.
        peak_bytes: most on the device, weights included; None on a CPU.
        score: share of the pass keys in the prompts that were found; None if there were none.
        eager: why steps were not recorded as CUDA graphs.
        dense_prefill_s: of `dense` at this length in the same run, None without it; the next four likewise.
        error: why there is no value: out of memory, or what a peer said.
    """

    method: str
    length: int
    batch: int
    tokens: int
    prefill_s: float | None = None
    prefill_runs_s: Sequence[float] = ()
    ttft_s: float | None = None
    token_ms: float | None = None
    token_p10_ms: float | None = None
    token_p90_ms: float | None = None
    tokens_per_s: float | None = None
    kv_bytes: int | None = None
    host_bytes: int | None = None
    kv_share: float | None = None
    peak_bytes: int | None = None
    score: float | None = None
    eager: str | None = None
    dense_prefill_s: float | None = None
    dense_token_ms: float | None = None
    dense_kv_bytes: int | None = None
    dense_peak_bytes: int | None = None
    dense_score: float | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefill_runs_s", tuple(self.prefill_runs_s))  # a list in JSON


def of_costs(method: str, length: int, batch: int, tokens: int, costs: list[Cost], score: float | None) -> Row:
    """The row of some runs; the baseline's columns are empty."""
    gaps = sorted(gap for cost in costs for gap in cost.gaps_ms)
    tenths = quantiles(gaps, n=10, method="inclusive") if len(gaps) > 1 else gaps * 9
    last, middle = costs[-1], median(gaps)
    peaks = [cost.peak_bytes for cost in costs if cost.peak_bytes is not None]
    return Row(
        method,
        length,
        batch,
        tokens,
        prefill_s=median(cost.prefill_s for cost in costs),
        prefill_runs_s=[cost.prefill_s for cost in costs],
        ttft_s=median(cost.ttft_s for cost in costs),
        token_ms=middle,
        token_p10_ms=tenths[0],
        token_p90_ms=tenths[-1],
        tokens_per_s=1000 * batch / middle,
        kv_bytes=last.kv_bytes,
        host_bytes=last.host_bytes,
        kv_share=last.kv_bytes / last.dense_kv_bytes if last.dense_kv_bytes else None,
        peak_bytes=max(peaks, default=None),
        score=score,
        eager=last.eager,
    )


@dataclass(frozen=True)
class Crossover:
    """From which length on a method was faster than dense wherever both were measured; None: nowhere.

    Attributes:
        method: name of the choice.
        decode_from: by ms of a token.
        prefill_from: by seconds of a prompt, where there were at least two.
        runs: prompts of each length, at least.
        longest: at which both were measured, None if at no length.
        decode_ratio: dense over the method at that length.
        prefill_ratio: likewise.
    """

    method: str
    decode_from: int | None
    prefill_from: int | None
    runs: int
    longest: int | None
    decode_ratio: float | None
    prefill_ratio: float | None


def crossovers(rows: Sequence[Row]) -> list[Crossover]:
    """One for each method beside the baseline, in the order of their first rows."""
    dense = {row.length: row for row in rows if row.method == BASELINE and row.error is None}
    found = []
    for method in dict.fromkeys(row.method for row in rows if row.method != BASELINE):
        mine = {row.length: row for row in rows if row.method == method and row.error is None and row.length in dense}
        pairs = [(mine[length], dense[length]) for length in sorted(mine)]
        last = pairs[-1] if pairs else None
        found.append(
            Crossover(
                method,
                decode_from=_first([(row.length, decodes_faster(row, base)) for row, base in pairs]),
                prefill_from=_first([(row.length, reads_faster(row, base)) for row, base in pairs]),
                runs=min((len(x.prefill_runs_s) for pair in pairs for x in pair), default=0),
                longest=last and last[0].length,
                decode_ratio=last and ratio(last[1].token_ms, last[0].token_ms),
                prefill_ratio=last and ratio(last[1].prefill_s, last[0].prefill_s),
            )
        )
    return found


def decodes_faster(row: Row, dense: Row) -> bool:
    """True if nine of ten steps take less than nine of ten of dense, by more than chance."""
    if row.token_p90_ms is None or dense.token_p10_ms is None or row.token_ms is None or dense.token_ms is None:
        return False
    return row.token_p90_ms < dense.token_p10_ms and row.token_ms <= _LESS * dense.token_ms


def reads_faster(row: Row, dense: Row) -> bool:
    """True if every run read its prompt in less than every run of dense, by more than chance; one run may be chance."""
    if row.prefill_s is None or dense.prefill_s is None or min(len(row.prefill_runs_s), len(dense.prefill_runs_s)) < 2:
        return False
    return max(row.prefill_runs_s) < min(dense.prefill_runs_s) and row.prefill_s <= _LESS * dense.prefill_s


def ratio(dense: float | None, mine: float | None) -> float | None:
    """How many times as fast; None without both."""
    return dense / mine if dense and mine else None


def _first(faster: Sequence[tuple[int, bool]]) -> int | None:
    """The length from which on all are True, of ascending ones."""
    first = None
    for length, yes in reversed(faster):
        if not yes:
            break
        first = length
    return first
