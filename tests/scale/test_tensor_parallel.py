from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hf_longctx as lc
from hf_longctx.methods import own_plan
from hf_longctx.models import inspect_model

from . import world


def run(processes: int, folder: Path) -> list[dict[str, Any]]:
    """What each process found."""
    cases = (world.LLAMA, world.ONE_HEAD, *(world.OTHERS if processes == 2 else ()))
    for case in cases:
        case.make().save_pretrained(folder / case.name)
    world.launch(processes, "split", folder)
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(processes)]


def written(model: Any, count: int) -> list[int]:
    ids = world.LLAMA.prompt(40)
    with lc.patched(model, world.methods("int8")["duo_attention"]):
        tokens: list[int] = model.generate(ids, max_new_tokens=count, do_sample=False)[0, 40:].tolist()
    return tokens


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_model_over_several_processes_writes_what_it_writes_whole(processes: int, tmp_path: Path) -> None:
    whole = world.LLAMA.make()
    expected, kept = world.answers(whole), written(whole, 4)
    assert len({str(tokens) for name, tokens in expected.items() if name.endswith("native")}) == 7  # methods differ
    found = run(processes, tmp_path)
    retrieval = [[gate >= 0.5 for gate in row] for row in world.GATES]
    size = world.KV_HEADS // processes
    for rank, mine in enumerate(found):
        assert mine["answers"] == expected, rank
        assert mine["kept"] == kept, rank
        own = [row[rank * size : (rank + 1) * size] for row in retrieval]
        groups = [[[h for h, mark in enumerate(row) if mark is role] for role in (True, False)] for row in own]
        assert mine["groups"] == [[heads for heads in layer if heads] for layer in groups], rank
        assert mine["eager"] == "the model's weights are split over several processes"
        told = mine["refused"]
        assert f"a model over {processes} processes; got one choice for all heads" in told["one choice for all heads"]
        assert f"no context on a model over {processes} processes" in told["a context"]
        assert f"plan: expected a whole model; got one over {processes} processes" in told["outlook"]
        assert "one choice for all heads" in told["supports"]
        assert "quest" not in told["supports"]
        assert f"whole KV heads on each of {processes} processes; got 1 KV heads" in mine["one head"]
    if processes == 2:
        expected = {case.name: world.ask(case.make(), "dense") for case in world.OTHERS}
        assert [mine["others"] for mine in found] == [expected] * 2


def split_facts(rank: int, ranks: int) -> Any:
    return replace(inspect_model(world.LLAMA.make()), rank=rank, ranks=ranks)


def test_thresholds_of_single_heads_go_with_their_heads() -> None:
    plan = world.methods("native")["lserve"].plan(split_facts(0, 1))
    found: dict[tuple[int, int], tuple[float, ...]] = {}
    for rank in range(2):
        for i, layer in enumerate(own_plan(plan, split_facts(rank, 2)).layers):
            for group in layer.groups:
                if group.policy.prefill is None:
                    continue
                shares = group.policy.prefill.budget.shares
                assert shares is not None
                for n, head in enumerate(group.kv_heads):
                    found[i, rank * 2 + head] = shares[2 * n : 2 * n + 2]
    retrieval = {(i, h) for i, row in enumerate(world.GATES) for h, gate in enumerate(row) if gate >= 0.5}
    assert found == {(i, h): tuple(world.TAU[i][2 * h : 2 * h + 2]) for i, h in retrieval}


def test_a_plan_whose_processes_would_rotate_otherwise_is_refused() -> None:
    groups = tuple(
        lc.HeadGroup((2 * i, 2 * i + 1), lc.HeadPolicy(lc.SinkWindow(sinks, 8), positions))
        for i, (sinks, positions) in enumerate(((2, lc.InCache()), (0, lc.Absolute())))
    )
    plan = lc.Plan("mine", (lc.LayerPlan(groups),) * world.LAYERS)
    assert own_plan(plan, split_facts(0, 1)) is plan
    for rank in range(2):
        with pytest.raises(lc.UnsupportedError, match="mine: expected positions that are counted alike on each of 2"):
            own_plan(plan, split_facts(rank, 2))


@pytest.mark.parametrize("styles", [("colwise", "colwise"), ("colwise", "rowwise", "colwise"), ("mine",) * 3])
def test_another_plan_of_tensor_parallelism_is_refused(styles: tuple[str, ...]) -> None:
    model = world.LLAMA.make()
    names = [f"model.layers.*.self_attn.{name}_proj" for name in "qkv"]
    model._tp_size, model._tp_plan = 2, dict(zip(names, styles, strict=False))
    with pytest.raises(
        lc.UnsupportedError, match="over 2 processes; got another plan of tensor parallelism for 'llama'"
    ):
        lc.patch(model, "dense")
    model._tp_plan = dict.fromkeys(names, "colwise_gather_output")
    assert inspect_model(model).ranks == 1  # all heads are everywhere
