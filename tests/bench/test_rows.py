"""From which length on a method pays, and the medians and tenths of many runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_longctx.bench import show
from hf_longctx.bench.cost import Cost
from hf_longctx.bench.rows import Row, crossovers, of_costs


def row(method: str, length: int, ms: float, s: float, spread: float = 0.05, error: str | None = None) -> Row:
    if error:
        return Row(method, length, 1, 8, error=error)
    tenths = {"token_p10_ms": ms * (1 - spread), "token_p90_ms": ms * (1 + spread)}
    runs = [s * (1 - spread), s, s * (1 + spread)]
    return Row(method, length, 1, 8, prefill_s=s, prefill_runs_s=runs, ttft_s=s, token_ms=ms, **tenths, kv_bytes=2**20)


def test_a_method_pays_from_where_it_stays_faster() -> None:
    dense = [row("dense", n, ms, ms) for n, ms in ((1024, 10), (2048, 10), (4096, 20), (8192, 40))]
    mine = [row("quest", n, ms, 2 * ms) for n, ms in ((1024, 5), (2048, 12), (4096, 12), (8192, 12))]
    (found,) = crossovers([*dense, *mine])
    assert (found.decode_from, found.prefill_from) == (4096, 8192)
    assert found.decode_ratio == pytest.approx(40 / 12)
    assert found.prefill_ratio == pytest.approx(40 / 24)
    assert "faster from 4,096 tokens on (3.33x dense at 8,192)" in show.describe(found)


@pytest.mark.parametrize(("ms", "spread", "faster"), [(7, 0.05, True), (9, 0.3, False), (9.8, 0.0001, False)])
def test_what_may_be_chance_is_not_faster(ms: float, spread: float, faster: bool) -> None:
    (found,) = crossovers([row("dense", 512, 10, 10, spread), row("quest", 512, ms, ms, spread)])
    assert (found.decode_from == 512) is faster
    assert (found.prefill_from == 512) is faster


def test_one_run_of_a_prompt_may_be_chance() -> None:
    rows = [replace(row(name, 512, ms, ms), prefill_runs_s=(ms,)) for name, ms in (("dense", 10.0), ("quest", 5.0))]
    (found,) = crossovers(rows)
    assert (found.decode_from, found.prefill_from, found.runs) == (512, None, 1)
    assert "reads prompts once, which may be chance (2.00x dense at 512)" in show.describe(found)


def test_a_length_that_one_of_both_lacks_says_nothing() -> None:
    rows = [row("dense", 512, 10, 10), row("dense", 1024, 0, 0, error="out of memory: x"), row("quest", 512, 5, 5)]
    rows += [row("quest", 1024, 5, 5), row("lserve", 512, 0, 0, error="out of memory: x")]
    quest, lserve = crossovers(rows)
    assert (quest.decode_from, quest.longest) == (512, 512)
    assert lserve.longest is None
    assert show.describe(lserve) == "lserve: nothing to compare, it or dense has no row."


def test_medians_and_tenths_are_over_all_steps() -> None:
    def cost(prefill: float, gaps: tuple[float, ...], peak: int) -> Cost:
        return Cost(prefill, prefill + 1, gaps, 50, 7, 100, peak, None, torch.zeros(1, 1))

    made = of_costs("x", 64, 2, 5, [cost(3, (1, 2, 3, 4, 5), 10), cost(9, (6, 7, 8, 9, 10, 11), 30)], 0.5)
    assert (made.prefill_s, made.prefill_runs_s, made.ttft_s) == (6, (3, 9), 7)
    assert (made.token_p10_ms, made.token_ms, made.token_p90_ms) == (2, 6, 10)
    assert made.tokens_per_s == pytest.approx(2000 / 6)
    assert (made.kv_bytes, made.host_bytes, made.kv_share, made.peak_bytes, made.score) == (50, 7, 0.5, 30, 0.5)
    one = of_costs("x", 64, 1, 1, [cost(3, (4.0,), 10)], None)
    assert (one.token_p10_ms, one.token_ms, one.token_p90_ms) == (4, 4, 4)
