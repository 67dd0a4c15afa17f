"""Every operation that can be timed gives what it is defined to give, on every backend; one that does not is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_longctx.bench import op, operations, rivals, stopwatch
from hf_longctx.bench.operations import OPERATIONS, SMALL, Size, arguments, difference
from hf_longctx.kernels import dispatch, flash, ops
from hf_longctx.kernels.compiled import prefill

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
EVERY = [(name, number) for name in OPERATIONS for number in range(len(SMALL[name]))]
TINY = Size(256, 1, 4, 2, 64, budget=64, window=80)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "number"), EVERY)
def test_every_backend_gives_what_is_defined(name: str, number: int, device: str) -> None:
    one, size, place = OPERATIONS[name], SMALL[name][number], torch.device(device)
    makers = op.backends_of(one, [size], place)
    assert makers
    for maker in makers:
        assert difference(one, size, lambda given, m=maker: m.prepare(given, size)(), place) is None, maker.by


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "rival",
    [pytest.param(rival, marks=[pytest.mark.slow] if rival.compiled else []) for rival in rivals.RIVALS],
    ids=lambda rival: rival.name,
)
def test_so_do_others(rival: rivals.Rival, device: str) -> None:
    place = torch.device(device)
    reason = rival.missing(place)
    if reason is not None:
        pytest.skip(reason)
    for name in rival.takes:
        assert op.refusal(OPERATIONS[name], op.Maker(rival.name, rival.prepare), TINY, place) is None, name


def test_others_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "find_spec", lambda name: None)
    monkeypatch.setenv("CXX", "no-compiler-of-this-name")
    found, absent = rivals.rivals_of(OPERATIONS["prefill"], TINY, torch.device("cpu"))
    assert [rival.name for rival in found] == ["torch sdpa"]
    assert absent == [
        "flex attention is absent: it needs a C++ compiler.",
        "flash-attn is absent: it needs flash_attn, which is not installed.",
        "flashinfer is absent: it needs flashinfer, which is not installed.",
    ]
    assert (
        "flex attention is absent: it needs triton, which is not installed."
        in rivals.rivals_of(OPERATIONS["prefill"], TINY, torch.device("cuda"))[1]
    )


def test_each_kind_of_difference_is_told() -> None:
    cpu, one = torch.device("cpu"), OPERATIONS["attend"]
    size = SMALL["attend"][0]
    right = one.run(arguments(one, size, cpu))
    wrong = right.clone()
    wrong[1, 3, 0, 5] += 0.25
    assert "off by 0.25" in str(difference(one, size, lambda _: wrong, cpu))
    wrong[1, 3, 0, 5] = torch.nan
    assert "off by inf" in str(difference(one, size, lambda _: wrong, cpu))
    assert "not (2, 8, 1, 64) of torch.bfloat16" in str(difference(one, size, lambda _: right.float(), cpu))
    pick = OPERATIONS["pick"]
    ids = pick.run(arguments(pick, size, cpu))
    ids[0, 0, 0, 1] += 1
    assert "differs in 1 of" in str(difference(pick, size, lambda _: ids, cpu))

    def forgets(given: tuple[Any, ...]) -> None:
        ops.append_pages(*given[:7], None, *given[8:])

    append = OPERATIONS["append"]
    assert "append, 300 tokens, 16 bits" in str(difference(append, size, forgets, cpu))


def test_an_operation_that_is_wrong_is_named_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (backend,) = (maker.by for maker in op.backends_of(OPERATIONS["score"], [TINY], torch.device("cpu")))
    table = dict(dispatch._table()["reference"])
    right = table["score_pages"].run

    def off(*given: Any) -> torch.Tensor:
        return right(*given) * 1.01

    wrong = {**dispatch._table()[backend], "score_pages": dispatch.Implementation(off)}
    if backend == "reference":  # it is what all are compared with
        pytest.skip("no backend but the definition")
    monkeypatch.setitem(dispatch._TABLE, backend, wrong)
    (row,) = op.run(["score"], [TINY], torch.device("cpu"), tmp_path, repeats=1)
    assert row.us is None
    assert str(row.error).startswith("not timed: score, 300 tokens")
    assert "off by" in str(row.error)
    monkeypatch.undo()
    (row,) = op.run(["score"], [TINY], torch.device("cpu"), tmp_path, repeats=1, resume=True)
    assert row.us is not None


def test_backends_that_are_asked_for_long_prompts_alone_are_checked_and_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, one, off = torch.device("cpu"), OPERATIONS["prefill"], [1.0]
    right = dispatch._table()["torch"]["attend_blocks"].run

    def rejects(q: torch.Tensor, *_: Any) -> str | None:
        return None if q.shape[2] >= flash.LEAST else "is asked for more keys"

    asked = dispatch.Implementation(lambda *given: right(*given) * off[0], rejects)
    monkeypatch.setitem(dispatch._TABLE, "flash", {"attend_blocks": asked})
    monkeypatch.setattr(rivals, "RIVALS", ())
    sizes = [TINY, replace(TINY, tokens=2 * flash.LEAST)]
    assert "flash" not in [maker.by for maker in op.backends_of(one, sizes[:1], cpu)]
    assert op.backends_of(one, sizes, cpu)[0].by == "flash"
    rows = op.run(["prefill"], sizes, cpu, tmp_path / "right", repeats=1)
    short, long = (row for row in rows if row.by == "flash")
    assert str(short.error).startswith("UnsupportedError: ")
    assert long.us is not None
    off[0] = 1.1
    rows = op.run(["prefill"], sizes, cpu, tmp_path / "wrong", repeats=1)
    assert [str(row.error)[:32] for row in rows if row.by == "flash"] == ["not timed: prefill, 2100 tokens,"] * 2


def test_each_backend_is_asked_for_a_size_that_is_checked() -> None:
    assert max(flash.LEAST, prefill.LONG) <= operations.LONG
    channels = {size.dim for size in SMALL["prefill"] if size.tokens == operations.LONG}
    assert channels & {*flash.DIMS} & {prefill.WIDE}


def test_rows_are_written_as_they_come_and_kept(tmp_path: Path) -> None:
    cpu, sizes = torch.device("cpu"), [TINY, replace(TINY, tokens=512)]
    rows = op.run(["attend", "append"], sizes, cpu, tmp_path, repeats=2)
    assert {(row.name, row.tokens) for row in rows} == {(n, t) for n in ("attend", "append") for t in (256, 512)}
    assert all(row.us and row.p10_us <= row.us <= row.p90_us and row.moved_bytes for row in rows)
    attend = [row for row in rows if row.name == "attend"]
    base = {row.tokens: row.us for row in attend if row.by == "torch sdpa"}
    assert all(row.dense_us == base[row.tokens] for row in attend)
    written = (tmp_path / "bench_op.jsonl").read_text().splitlines()
    assert [json.loads(line)["us"] for line in written] == [row.us for row in rows]
    assert op.run(["attend", "append"], sizes, cpu, tmp_path, repeats=2, resume=True) == rows
    with pytest.raises(ValueError, match="made with repeats=3"):
        op.run(["attend"], sizes, cpu, tmp_path, repeats=3, resume=True)


def test_bytes_are_those_of_the_arguments() -> None:
    cpu = torch.device("cpu")
    for bits in (16, 8, 4):
        size = replace(TINY, tokens=64, bits=bits)
        _, k, v, *_ = arguments(OPERATIONS["attend"], size, cpu)
        assert OPERATIONS["attend"].moved(size) == k.nbytes + v.nbytes
    assert OPERATIONS["score"].moved(TINY) == arguments(OPERATIONS["score"], TINY, cpu)[1].nbytes
    assert OPERATIONS["pick"].moved(TINY) == arguments(OPERATIONS["pick"], TINY, cpu)[0].nbytes


def test_the_stopwatch_divides_a_round() -> None:
    calls: list[int] = []
    many = [lambda i=i: calls.append(i) for i in range(3)]
    took = stopwatch.measure(many, torch.device("cpu"), 4)
    assert calls == [0, 1, *[0, 1, 2] * 4]
    assert 0 < took.p10_us <= took.us <= took.p90_us
    assert took.recorded is None
    assert stopwatch.copies(1) == 64
    assert stopwatch.copies(1 << 40) == 1
    assert stopwatch.copies(stopwatch.ROUND_BYTES / 3) == 3


@pytest.mark.cuda
def test_the_stopwatch_replays_what_can_be_recorded_and_says_what_cannot() -> None:
    x = torch.zeros(1 << 20, device="cuda")
    took = stopwatch.measure([lambda: x.add_(1)] * 3, x.device, 5)
    assert took.recorded
    assert 0 < took.p10_us <= took.us <= took.p90_us
    assert stopwatch.measure([lambda: x.sum().item()], x.device, 5).recorded is False


@pytest.mark.parametrize(
    ("names", "size", "said"),
    [
        (["atend"], TINY, "bench op: expected some of attend"),
        (["score"], replace(TINY, bits=4), "--bits: expected 16 for 'score'"),
        (["attend"], replace(TINY, bits=3), "--bits: expected 16, 8 or 4; got 3"),
        (["attend"], replace(TINY, q_heads=3), "--q-heads: expected a multiple of the 2 KV heads; got 3"),
    ],
)
def test_what_cannot_be_timed_is_refused(names: list[str], size: Size, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        op.run(names, [size], torch.device("cpu"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_backend_that_takes_no_small_size_is_not_timed() -> None:
    def never(given: Any, size: Size) -> Any:
        raise NotImplementedError

    said = op.refusal(OPERATIONS["attend"], op.Maker("other", never), TINY, torch.device("cpu"))
    assert "none of the small sizes" in str(said)
    assert operations.OPERATIONS.keys() == SMALL.keys()
