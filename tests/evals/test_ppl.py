from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

import hf_longctx as lc
from hf_longctx.evals import ppl, ppl_run, text

SETTINGS = ppl_run.Settings("tiny", "shipped", "0", 200, 16, 64, "float32")


@pytest.fixture
def ids(tiny: tuple[Any, Any]) -> torch.Tensor:
    return text.stream_ids(tiny[1], text.shipped(), 200)


def at_once(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="none")


@pytest.mark.parametrize("chunk", [1, 7, 64, 500])
def test_chunks_do_not_change_the_likelihoods_of_the_stock_model(
    tiny: tuple[Any, Any], ids: torch.Tensor, chunk: int
) -> None:
    model, _ = tiny
    got = torch.cat(list(ppl.token_nll(model, ids, chunk)))
    torch.testing.assert_close(got, at_once(model, ids), atol=2e-4, rtol=2e-4)


def test_blocks_cover_every_predicted_token_once_and_dense_is_the_stock_model(
    tiny: tuple[Any, Any], ids: torch.Tensor
) -> None:
    model, _ = tiny
    counted: list[int] = []
    rows = ppl.evaluate(model, ids, ppl.Variant("dense", "dense"), 16, 64, counted.append)
    assert [(row.start, row.stop) for row in rows] == [(1, 65), (65, 129), (129, 193), (193, 200)]
    assert sum(counted) == 199
    nll = at_once(model, ids)
    for row in rows:
        assert row.nll == pytest.approx(nll[row.start - 1 : row.stop - 1].mean().item(), rel=1e-4)
        assert row.ppl == pytest.approx(2.718281828459045**row.nll, rel=1e-6)
    assert not any(name.startswith("_hf_longctx") for name in vars(model))


def test_streaming_holds_a_constant_cache_and_is_dense_where_its_window_is_long_enough(
    tiny: tuple[Any, Any], ids: torch.Tensor
) -> None:
    model, _ = tiny
    dense, wide, narrow = (
        ppl.evaluate(model, ids, variant, 16, 64, lambda count: None)
        for variant in (
            ppl.Variant("dense", "dense"),
            ppl.Variant("wide", "streaming_llm", {"sinks": 4, "window": 300}),
            ppl.Variant("narrow", "streaming_llm", {"sinks": 4, "window": 28}),
        )
    )
    assert [row.nll for row in wide] == pytest.approx([row.nll for row in dense], rel=1e-4)
    assert len({row.kv_bytes for row in narrow}) == 1
    assert narrow[-1].kv_bytes < dense[-1].kv_bytes / 2
    assert abs(narrow[-1].nll - dense[-1].nll) > 1e-3


def test_a_limit_stops_a_method_early(tiny: tuple[Any, Any], ids: torch.Tensor) -> None:
    rows = ppl.evaluate(tiny[0], ids, ppl.Variant("dense", "dense", limit=100), 16, 64, lambda count: None)
    assert rows[-1].stop == 100


def test_the_window_baseline_stores_as_much_as_streaming_llm() -> None:
    window, streaming = ppl.variants(["window", "streaming_llm"], 4, 1020)
    assert window.method == streaming.method == "streaming_llm"
    assert window.knobs == {"sinks": 0, "window": 1024}


@pytest.mark.parametrize("names", [[], ["dense", "dense"]])
def test_variants_refuses_empty_and_double_names(names: list[str]) -> None:
    with pytest.raises(ValueError, match="methods: expected"):
        ppl.variants(names, 4, 1020)


def test_a_block_that_is_no_multiple_of_the_chunk_is_refused(tiny: tuple[Any, Any], ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="multiple of the chunk; got block 64 and chunk 48"):
        ppl.evaluate(tiny[0], ids, ppl.Variant("dense", "dense"), 48, 64, lambda count: None)


def test_a_run_is_stored_with_what_it_takes_to_run_it_again(
    tiny: tuple[Any, Any], ids: torch.Tensor, tmp_path: Path
) -> None:
    model, _ = tiny
    chosen = ppl.variants(["dense", "streaming_llm"], 2, 30)
    rows = ppl_run.run(model, ids, chosen, SETTINGS, tmp_path, False, Console(quiet=True))
    stored = json.loads((tmp_path / "ppl.json").read_text())
    assert [ppl.Row(**row) for row in stored["rows"]] == rows
    about = stored["meta"]
    assert about["settings"]["methods"][1]["knobs"] == {"sinks": 2, "window": 30}
    assert about["versions"]["torch"] == torch.__version__
    assert about["device"].startswith("cpu")
    assert about["date"].endswith("+00:00")
    assert (tmp_path / "ppl.png").read_bytes().startswith(b"\x89PNG")


def test_resume_keeps_what_is_there_and_refuses_other_settings(
    tiny: tuple[Any, Any], ids: torch.Tensor, tmp_path: Path
) -> None:
    model, _ = tiny
    quiet = Console(quiet=True)
    first = ppl_run.run(model, ids, ppl.variants(["dense"], 2, 30), SETTINGS, tmp_path, False, quiet)
    both = ppl_run.run(model, ids, ppl.variants(["dense", "window"], 2, 30), SETTINGS, tmp_path, True, quiet)
    assert both[: len(first)] == first  # `seconds` included: it did not run again
    wider = ppl_run.run(model, ids, ppl.variants(["dense", "window"], 2, 60), SETTINGS, tmp_path, True, quiet)
    assert wider[: len(first)] == first
    assert [row.nll for row in wider[len(first) :]] != [row.nll for row in both[len(first) :]]
    other = ppl_run.Settings(**{**vars(SETTINGS), "chunk": 32})
    with pytest.raises(ValueError, match=r"--resume: expected .* chunk=32; got 16"):
        ppl_run.run(model, ids, ppl.variants(["dense"], 2, 30), other, tmp_path, True, quiet)


def test_a_method_that_does_not_exist_leaves_the_model_unpatched(tiny: tuple[Any, Any], ids: torch.Tensor) -> None:
    model, _ = tiny
    with pytest.raises(ValueError, match="streming_llm"):
        ppl.evaluate(model, ids, ppl.Variant("streming_llm", "streming_llm"), 16, 64, lambda count: None)
    with pytest.raises(ValueError, match="patched"):
        lc.report(model)
