"""What a session does: rounds, questions, several streams, memory that stands still, and files to go on from."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import hf_longctx as lc
from hf_longctx.stream import Event, Frame, Session, load_session, save_session

from ..integration.cases import BY_NAME as TEXT
from .vlms import ANY, BY_NAME, clip, families

SMALL: dict[str, Any] = {"window_s": 3, "text_sink": 90, "text_window": 90, "max_new_tokens": 5, "query": "Go on."}


@pytest.fixture(scope="module")
def vlm() -> tuple[Any, Any]:
    return BY_NAME[ANY].make()


def texts(events: Any) -> list[str]:
    return [event.text for event in events]


# rounds ---------------------------------------------------------------------------------------------------------------


def test_a_round_is_a_second_of_frames(vlm: tuple[Any, Any]) -> None:
    with Session(*vlm, **SMALL) as session:
        events = list(session.run(clip(3, fps=4)))
    assert [(e.t, e.t_end, e.round, e.frames, e.kind) for e in events] == [
        (0, 1, 0, 4, "caption"),
        (1, 2, 1, 4, "caption"),
        (2, 3, 2, 4, "caption"),
    ]
    assert all(0 < e.tokens <= 5 for e in events)
    assert all(e.latency_s > 0 for e in events)


def test_each_frame_is_encoded_once(vlm: tuple[Any, Any]) -> None:
    patches: list[int] = []
    tower = vlm[0].get_encoder(modality="image")

    def seen(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        patches.append(len(next(iter((*args, *kwargs.values())))))

    hook = tower.register_forward_pre_hook(seen, with_kwargs=True)
    try:
        with Session(*vlm, **SMALL) as session:
            list(session.run(clip(6)))
            session.ask("Who?")
    finally:
        hook.remove()
    assert len(patches) == 6
    assert len(set(patches)) == 1


def test_a_change_of_size_cuts_the_round(vlm: tuple[Any, Any]) -> None:
    frames = [*clip(1.5), *clip(1.5, size=(48, 48), t=1.5)]
    with Session(*vlm, **SMALL) as session:
        events = list(session.run(frames))
    assert [(e.t, e.t_end, e.frames) for e in events] == [(0, 1, 2), (1, 1.5, 1), (1.5, 2, 1), (2, 3, 2)]


def test_frames_of_a_second_call_go_on_where_the_stream_stands(vlm: tuple[Any, Any]) -> None:
    with Session(*vlm, **SMALL) as session:
        first, second = list(session.run(clip(4))), list(session.run(clip(2, seed=1)))
    with Session(*vlm, **SMALL) as session:
        once = list(session.run([*clip(4), *clip(2, seed=1, t=4)]))
    assert texts(first + second) == texts(once)
    assert [e.t for e in first + second] == [e.t for e in once]


def test_the_budget_of_time_ends_an_answer(vlm: tuple[Any, Any]) -> None:
    with Session(*vlm, **{**SMALL, "round_budget_s": 1e-9}) as session:
        events = list(session.run(clip(2)))
    assert [(e.tokens, e.stopped) for e in events] == [(1, "time"), (1, "time")]


def test_drawn_tokens_follow_the_seed(vlm: tuple[Any, Any]) -> None:
    drawn = hf.GenerationConfig(do_sample=True, temperature=3.0, top_k=50, top_p=0.9, repetition_penalty=1.1)
    said = []
    for seed in (0, 0, 1):
        with Session(*vlm, **SMALL, generation=drawn, seed=seed) as session:
            said.append(texts(session.run(clip(3))))
    assert said[0] == said[1] != said[2]


def test_paused_it_drops_and_counts(vlm: tuple[Any, Any]) -> None:
    with Session(*vlm, **SMALL) as session:
        times = []
        for event in session.run(clip(6)):
            times.append(event.t)
            session.pause()
            session.resume()
        session.pause()
        assert list(session.run(clip(2))) == []
        session.resume()
        assert len(list(session.run(clip(1)))) == 1
        assert times == [0, 1, 2, 3, 4, 5]
        assert session.stats.frames_dropped == 4
        assert session.stats.frames == 14


def test_an_error_of_the_source_comes_after_the_rounds_before_it(vlm: tuple[Any, Any]) -> None:
    def broken() -> Iterator[Frame]:
        yield from clip(2.5)
        raise OSError("unplugged")

    events: list[Event] = []
    with Session(*vlm, **SMALL) as session:
        with pytest.raises(OSError, match="unplugged"):
            events += session.run(broken())
        assert [event.t for event in session.run(clip(1))] == [3]
    assert session.stats.rounds == 4


def test_after_a_turn_that_broke_off_there_is_no_other(vlm: tuple[Any, Any], tmp_path: Path) -> None:
    def broken(*args: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    with Session(*vlm, **SMALL) as session:
        list(session.run(clip(2)))
        hook = vlm[0].get_encoder(modality="image").register_forward_pre_hook(broken)
        with pytest.raises(torch.OutOfMemoryError):
            list(session.run(clip(1)))
        hook.remove()
        with pytest.raises(RuntimeError, match="expected every turn to run to its end"):
            list(session.run(clip(1)))
        with pytest.raises(RuntimeError, match="expected every turn to run to its end"):
            save_session(session, tmp_path / "s.safetensors")
        assert not list(tmp_path.iterdir())
    with Session(*vlm, **SMALL) as session:
        assert len(list(session.run(clip(1)))) == 1


# questions ------------------------------------------------------------------------------------------------------------


def test_a_pinned_question_never_goes_and_another_one_does(vlm: tuple[Any, Any]) -> None:
    with Session(*vlm, **SMALL) as session:
        decode = session.engine.chat.decode
        for event in session.run(clip(12)):
            if event.round == 3:
                answer = session.ask("Who scored?")
                session.ask("And why?", pinned=False)
        kept = [decode(held.ids) for held in session.engine.rows[0].spans]
    assert (answer.kind, answer.t, answer.round) == ("answer", 4.0, 4)
    assert any("Who scored?" in text for text in kept)
    assert not any("And why?" in text for text in kept)


def test_pinned_text_is_bounded_by_the_sink(vlm: tuple[Any, Any]) -> None:
    with Session(*vlm, **SMALL) as session:
        list(session.run(clip(2)))
        before = session.stats.tokens_held
        with pytest.raises(ValueError, match=r"expected a turn that fits text_sink=90, .*; got \d+"):
            session.ask("x" * 80)
        with pytest.raises(ValueError, match=r"expected a turn that fits text_window=90, .*; got \d+"):
            session.ask("x" * 70, pinned=False)
        assert session.stats.tokens_held == before
        assert len(list(session.run(clip(1)))) == 1


def test_questions_from_another_thread_wait_for_the_round(vlm: tuple[Any, Any]) -> None:
    answers: list[Event] = []
    with Session(*vlm, **{**SMALL, "text_sink": 400}) as session:
        asking = threading.Thread(target=lambda: answers.extend(session.ask(f"{i}?", pinned=False) for i in range(5)))
        asking.start()
        events = list(session.run(clip(10)))
        asking.join()
    assert (len(events), len(answers)) == (10, 5)


# several streams ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families("qwen2_5_vl", "qwen3_vl", "llava_onevision", "idefics3"))
def test_streams_in_a_batch_say_what_they_say_alone(name: str) -> None:
    """Lengths differ: another seed ends answers elsewhere, one stream is shorter, and one is asked."""
    model, processor = BY_NAME[name].make()
    clips = [clip(7), clip(5, seed=1)]

    alone = []
    for number, frames in enumerate(clips):
        with Session(model, processor, **SMALL) as session:
            said = []
            for event in session.run(frames):
                said.append(event.text)
                if number == 1 and event.round == 2:
                    said.append(session.ask("Who?").text)
            alone.append(said)
    with Session(model, processor, **SMALL, streams=2) as session:
        together: list[list[str]] = [[], []]
        for event in session.run(clips):
            together[event.stream].append(event.text)
            if event.stream == 1 and event.round == 2:
                together[1].append(session.ask("Who?", stream=1).text)
    assert together == alone


# memory ---------------------------------------------------------------------------------------------------------------


def test_bytes_and_tokens_stand_still_on_a_long_stream(vlm: tuple[Any, Any]) -> None:
    held, tokens = [], []
    picture = clip(1)[0].image
    frames = (Frame(1000.0 + i, picture) for i in range(120))  # as many digits in every round
    with Session(*vlm, **{**SMALL, "max_new_tokens": 2}) as session:
        for event in session.run(frames):
            held.append(session.stats.bytes_held)
            tokens.append(session.stats.tokens_held[0])
            assert session.engine.rows[0].next <= tokens[-1]
            assert event.tokens <= 2
    assert len(set(held[30:])) == 1
    assert max(tokens[30:]) == max(tokens[:30])
    assert max(tokens) <= 90 + 90 + 3 * 40


@pytest.mark.parametrize("name", families("qwen2_5_vl"))
def test_a_cap_on_vision_tokens_holds_whatever_the_size(name: str) -> None:
    vlm = BY_NAME[name].make()
    with Session(*vlm, **{**SMALL, "vision_tokens": 60}) as session:
        for _ in session.run([*clip(4), *clip(4, size=(40, 64), t=4)]):
            sizes = [len(held.ids) for held in session.engine.rows[0].spans if held.kind == "vision"]
            assert 0 < sum(sizes) <= 60
    with Session(*vlm, **{**SMALL, "vision_tokens": 30}) as session:
        list(session.run(clip(2)))
        with pytest.raises(ValueError, match=r"expected a turn that fits vision_tokens=30, .*; got \d+"):
            list(session.run(clip(1, size=(40, 64))))
        assert len(list(session.run(clip(1)))) == 1


# files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families("qwen2_5_vl", "idefics3"))
def test_a_loaded_session_goes_on_as_the_saved_one(name: str, tmp_path: Path) -> None:
    model, processor = BY_NAME[name].make()
    drawn = hf.GenerationConfig(do_sample=True, temperature=2.0)
    with Session(model, processor, **SMALL, generation=drawn) as session:
        list(session.run(clip(5)))
        session.ask("Who?")
        save_session(session, tmp_path / "s.safetensors")
        expected = [*texts(session.run(clip(4, seed=3))), session.ask("And?").text]
        stats = session.stats
    other, processor = BY_NAME[name].make()
    with load_session(other, processor, tmp_path / "s.safetensors", generation=drawn) as session:
        got = [*texts(session.run(clip(4, seed=3))), session.ask("And?").text]
        assert got == expected
        assert (session.stats.rounds, session.stats.tokens_held) == (stats.rounds, stats.tokens_held)


def test_a_file_that_is_no_session_is_refused(vlm: tuple[Any, Any], tmp_path: Path) -> None:
    model = TEXT["llama"].make()
    lc.patch(model, "dense")
    with torch.no_grad():
        filled = model(torch.ones(1, 4, dtype=torch.int64)).past_key_values
    lc.save_session(model, tmp_path / "cache.safetensors", filled)
    with pytest.raises(ValueError, match="expected the file of a stream session; got that of a cache"):
        load_session(*vlm, tmp_path / "cache.safetensors")


# bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"window_s": 0.5}, "expected window_s to hold a round of 1 s; got 0.5"),
        ({"window_s": 0}, "expected vision_seconds as a number > 0; got 0"),
        (
            {"text_sink": 10},
            r"expected text_sink to hold the query and what the chat template adds, \d+ tokens; got 10",
        ),
        ({"text_window": 10}, r"expected text_window to hold an answer .*, \d+ tokens; got 10"),
        ({"text_window": 0}, "expected text_window as a whole number of tokens >= 1; got 0"),
        ({"round_s": 0}, "expected round_s as seconds > 0; got 0"),
        ({"round_budget_s": -1.0}, "expected round_budget_s as seconds > 0; got -1.0"),
        ({"max_new_tokens": 0}, "expected max_new_tokens as a whole number >= 1; got 0"),
        ({"streams": 0}, "expected streams as a whole number >= 1; got 0"),
        ({"query": " "}, "expected query as words; got ' '"),
        ({"vision_tokens": 0}, "expected vision_tokens as a whole number >= 1 or None; got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(vlm: tuple[Any, Any], knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Session(*vlm, **{**SMALL, **knobs})


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([Frame(1.0, torch.zeros(8, 8, 3, dtype=torch.uint8))] * 2, "expected frames in the order of their times"),
        ([Frame(0.0, torch.zeros(8, 8, 4, dtype=torch.uint8))], r"expected pictures of \[H, W, 3\]; got \[8, 8, 4\]"),
    ],
)
def test_frames_that_cannot_be_read_are_refused(vlm: tuple[Any, Any], frames: list[Frame], words: str) -> None:
    with Session(*vlm, **SMALL) as session, pytest.raises(ValueError, match=words):
        list(session.run(frames))


def test_what_is_no_frame_is_refused(vlm: tuple[Any, Any]) -> None:
    with Session(*vlm, **SMALL) as session:
        with pytest.raises(TypeError, match="expected frames; got int"):
            list(session.run([1, 2]))  # type: ignore[list-item]
        with pytest.raises(ValueError, match="expected a stream from 0 to 0; got 1"):
            session.ask("Who?", stream=1)
    with Session(*vlm, **SMALL, streams=2) as session, pytest.raises(ValueError, match="of 2 streams; got 1"):
        list(session.run([clip(1)]))


def test_outside_with_nothing_runs(vlm: tuple[Any, Any]) -> None:
    session = Session(*vlm, **SMALL)
    with pytest.raises(RuntimeError, match="expected to be used inside `with`"):
        list(session.run(clip(1)))
    with session, pytest.raises(RuntimeError, match="expected one `with` at a time"), session:
        pytest.fail("entered twice")


def test_other_models_are_refused_by_name(vlm: tuple[Any, Any]) -> None:
    with pytest.raises(lc.UnsupportedError, match=r"expected a vision-language model .*qwen2_5_vl.*; got .*'llama'"):
        Session(TEXT["llama"].make(), vlm[1])


def test_a_chat_template_that_rewrites_what_was_said_is_refused(vlm: tuple[Any, Any]) -> None:
    model, processor = BY_NAME[ANY].make()
    processor.chat_template = "{{ messages | length }} turns, the last {{ messages[-1].content[0].text }}"
    with pytest.raises(lc.UnsupportedError, match="does not simply add a turn to those before it"):
        Session(model, processor, **SMALL)
