"""Scores are those of the definition, carried out literally on transformers' own attention weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_longctx as lc
from hf_longctx.evals import text
from hf_longctx.heads import detect
from hf_longctx.heads.detect import Row, Settings, copies, prompts, recall, run, score
from hf_longctx.heads.needles import Hidden, Needle, load_needles
from hf_longctx.heads.writing import Written, following, freely
from hf_longctx.testing import tiny_llama

from ..integration.snapshot import differences, snapshot

NEEDLE = Needle("a b.", "c?", "b")


def some_prompts(lengths: tuple[int, ...]) -> list[Tensor]:
    """Few different tokens, so that a random model writes some that stand in the prompt, too."""
    made = torch.Generator().manual_seed(0)
    return [torch.randint(4, 12, (length,), generator=made) for length in lengths]


def model_of_few_words(device: torch.device, seed: int = 0) -> Any:
    model = tiny_llama(seed, vocab_size=12).to(device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


class Letters:
    """A tokenizer as far as an answer needs one: no token is the end of a line."""

    eos_token_id, pad_token_id = None, 0

    def decode(self, ids: list[int], **kwargs: Any) -> str:
        return "".join(chr(97 + i) for i in ids)


def literally(model: Any, prompt: Tensor, span: tuple[int, int], new: int) -> tuple[dict[str, int], dict[str, int]]:
    """The definition, step by step, on full eager attention weights."""
    model.set_attn_implementation("eager")
    ids = prompt[None]
    once: dict[str, set[int]] = {}
    times: dict[str, int] = {}
    for _ in range(new):
        out = model(ids, output_attentions=True, use_cache=False)
        token = int(out.logits[0, -1].argmax())
        for layer, weights in enumerate(out.attentions):
            for head in range(weights.shape[1]):
                place = int(weights[0, head, -1].argmax())
                if span[0] <= place < span[1] and int(prompt[place]) == token:
                    once.setdefault(f"{layer}-{head}", set()).add(place)
                    times[f"{layer}-{head}"] = times.get(f"{layer}-{head}", 0) + 1
        ids = torch.cat((ids, torch.tensor([[token]])), 1)
    return {head: len(places) for head, places in once.items()}, times


def test_what_heads_copied_is_what_the_definition_says() -> None:
    given, spans = some_prompts((40, 33, 26)), [(2, 35), (0, 20), (5, 26)]
    once = times = 0
    for seed in range(4):
        model = model_of_few_words(torch.device("cpu"), seed)
        with lc.patched(model, "dense"):
            said = freely(model, Letters(), given, 16, 16)
        for prompt, span, written in zip(given, spans, said, strict=True):
            with torch.no_grad():
                paper, code = literally(model, prompt, span, 16)
            assert copies(written, Hidden(prompt, span, NEEDLE)) == (paper, code)
            once, times = once + sum(paper.values()), times + sum(code.values())
    assert 10 < once < times  # some were copied, and some of them again


def test_reading_an_answer_sees_what_writing_it_saw(device: torch.device) -> None:
    """Teacher forcing on what was written agrees with free running, in a batch of unequal rows and any chunks."""
    model = model_of_few_words(device)
    given = some_prompts((40, 33, 26))
    with lc.patched(model, "dense"):
        free = freely(model, Letters(), given, 9, 16)
        answers = [written.tokens[: 9 - 2 * row] for row, written in enumerate(free)]
        forced = following(model, given, answers, 10)
        alone = [following(model, [prompt], [answer], 64)[0] for prompt, answer in zip(given, answers, strict=True)]
    for row, written in enumerate(free):
        count = 9 - 2 * row
        for other in (forced[row], alone[row]):
            assert other.tokens == other.foretold == written.tokens[:count]
            for head, places in written.places.items():
                assert other.places[head].tolist() == places[:count].tolist()
                torch.testing.assert_close(other.shares[head], written.shares[head][:count], rtol=1e-3, atol=1e-4)


def test_an_answer_ends_where_the_generation_configuration_says_and_with_its_first_line() -> None:
    model = model_of_few_words(torch.device("cpu"))
    [prompt] = some_prompts((30,))
    with lc.patched(model, "dense"):
        [whole] = freely(model, Letters(), [prompt], 12, 16)
        stop = whole.tokens[5]
        first = whole.tokens.index(stop)
        model.generation_config.eos_token_id = [stop]
        [stopped] = freely(model, Letters(), [prompt], 12, 16)
        model.generation_config.eos_token_id = None

        class Lines(Letters):
            def decode(self, ids: list[int], **kwargs: Any) -> str:
                return super().decode(ids).replace(chr(97 + stop), "\n")

        [line] = freely(model, Lines(), [prompt], 12, 16)
    assert stopped.tokens == whole.tokens[:first]
    assert all(len(places) == first for places in stopped.places.values())
    blank = next(i for i, token in enumerate(whole.tokens) if token == stop and i) if first == 0 else first
    assert line.tokens == whole.tokens[:blank]


@pytest.mark.parametrize(
    ("said", "share"),
    [
        ("Two RIPE pears!", 1.0),
        ("ripe", 1 / 3),
        ("ripe ripe ripe", 1 / 3),
        ("", 0.0),
        ("pears, two of them, ripe", 1.0),
    ],
)
def test_recall_is_the_share_of_the_wanted_words(said: str, share: float) -> None:
    assert recall(said, "two ripe pears") == pytest.approx(share)


def test_a_place_counts_once_in_the_paper_and_each_time_in_the_code() -> None:
    places = {(0, 0): torch.tensor([3, 3, 4, 9]), (0, 1): torch.tensor([0, 9, 2, 2])}
    hidden = Hidden(torch.tensor([5, 5, 5, 7, 8, 5, 5, 5, 5, 7]), (3, 6), NEEDLE)
    written = Written([7, 7, 8, 7], [7, 7, 8, 7], places, {})
    assert copies(written, hidden) == ({"0-0": 2}, {"0-0": 3})


# runs ----------------------------------------------------------------------------------------------------------------


def grid(tiny: tuple[Any, Any], out: Path | None = None, resume: bool = False, **changes: Any) -> list[Row]:
    knobs: dict[str, Any] = {"trials": 2, "new_tokens": 4, "batch": 3, "chunk": 64}
    settings = Settings([260, 300], [0.0, 1.0], **{**knobs, **changes})
    asked = prompts(tiny[1], text.shipped()[:20_000], load_needles(), settings)
    return run(*tiny, asked, settings, out, {"needles": "shipped"}, resume)


@pytest.mark.parametrize("forced", [False, True])
def test_trials_that_run_together_are_trials_alone_and_the_model_is_as_it_was(
    tiny: tuple[Any, Any], forced: bool
) -> None:
    before = snapshot(tiny[0])
    together, alone = grid(tiny, forced=forced), grid(tiny, forced=forced, batch=1)
    assert differences(before, snapshot(tiny[0])) == []
    assert len(together) == 8
    assert {row.needle for row in together} > {together[0].needle}
    for a, b in zip(together, alone, strict=True):
        assert (a.key, a.seed, a.answer, a.paper, a.code) == (b.key, b.seed, b.answer, b.paper, b.code)
        assert a.share.keys() == {f"{n}-{h}" for n in range(2) for h in range(4)}
        assert a.share == pytest.approx(b.share, abs=2e-4)


def test_an_interrupted_run_goes_on_and_a_run_of_other_settings_does_not(
    tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "scores.json"
    whole = grid(tiny, out)
    path = tmp_path / "scores.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:30])
    ran: list[int] = []
    real = detect._rows

    def count(model: Any, tokenizer: Any, batch: list[Any], settings: Settings) -> list[Row]:
        ran.append(len(batch))
        return real(model, tokenizer, batch, settings)

    monkeypatch.setattr(detect, "_rows", count)
    again = grid(tiny, out, resume=True)
    assert sum(ran) == 3
    assert again == whole
    assert len(path.read_bytes().splitlines()) == 8
    with pytest.raises(ValueError, match="expected no former rows"):
        grid(tiny, out)
    with pytest.raises(ValueError, match="to be made with forced=True; got False"):
        grid(tiny, out, resume=True, forced=True)
    assert json.loads((tmp_path / "run_meta.json").read_text())["scores"]["settings"]["needles"] == "shipped"


def row(recalled: float, paper: dict[str, int], code: dict[str, int]) -> Row:
    return Row(100, 0.5, 0, 0, "b", 99, (10, 14), "b", recalled, paper, code, {})


def test_only_right_answers_count() -> None:
    rows = [row(1.0, {"0-1": 2}, {"0-1": 6}), row(0.5, {"0-1": 4}, {}), row(0.6, {"1-0": 4}, {"1-0": 4})]
    paper, code = (score(rows, [2, 1], mode, "m") for mode in ("paper", "code"))
    assert paper.trials == {(0, 0): (0.0, 0.0), (0, 1): (0.5, 0.0), (1, 0): (0.0, 1.0)}
    assert code.trials == {(0, 0): (0.0, 0.0), (0, 1): (1.5, 0.0), (1, 0): (0.0, 1.0)}
    with pytest.raises(ValueError, match="heads detect: expected a right answer; got none in 1 trials"):
        score(rows[1:2], [2, 1], "paper", "m")


@pytest.mark.parametrize("changes", [{"trials": 0}, {"batch": 0}, {"chunk": 0}, {"new_tokens": 0}, {"lengths": []}])
def test_what_cannot_be_asked_is_refused(changes: dict[str, Any]) -> None:
    knobs: dict[str, Any] = {"lengths": [300], "depths": [0.5], **changes}
    with pytest.raises(ValueError, match=f"heads detect, {next(iter(changes))}: expected at least 1; got 0"):
        Settings(**knobs)
    with pytest.raises(ValueError, match="expected depths from 0 to 1"):
        Settings([300], [1.5])
    with pytest.raises(ValueError, match="expected a mode among paper, code; got 'other'"):
        Settings([300], [0.5], mode="other")
