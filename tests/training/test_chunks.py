"""Overlapped pieces of a transcript, second by second, and what of the past they keep."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_longctx.testing.vision import tiny_tokenizer
from hf_longctx.training.chunks import Asked, Chunk, OverlappedChunks, Word, capped, seconds

TALK = [Word(n / 3, n / 3 + 0.2, f"w{n}") for n in range(180)]  # three words a second for a minute


def test_pieces_overlap_and_carry_what_came_before() -> None:
    pieces = OverlappedChunks().cut("a.mp4", 60, TALK)
    assert [(piece.start, piece.end) for piece in pieces] == [(0, 24), (12, 36), (24, 48), (36, 60)]
    for piece in pieces:
        assert piece.words == tuple(word for word in TALK if piece.start <= word.start < piece.end)
        assert piece.previous.split() == [word.text for word in TALK if word.start < piece.start]
    assert OverlappedChunks().cut("a.mp4", 59.9, TALK) == pieces[:3]


def test_pieces_with_few_words_are_left_out() -> None:
    sparse = [word for word in TALK if not 20 <= word.start < 40]
    assert [piece.start for piece in OverlappedChunks().cut("a.mp4", 60, sparse)] == [0, 36]
    assert [piece.start for piece in OverlappedChunks(min_words=0).cut("a.mp4", 60, [])] == [0, 12, 24, 36]


def test_it_maps_a_batch_of_a_table() -> None:
    batch = {
        "video": ["a.mp4", "b.mp4", "short.mp4"],
        "duration": [48.0, 30.0, 5.0],
        "query": ["Q1", "Q2", "Q3"],
        "word_start": [[w.start for w in TALK]] * 3,
        "word_end": [[w.end for w in TALK]] * 3,
        "word": [[w.text for w in TALK]] * 3,
    }
    rows = OverlappedChunks()(batch)
    assert rows["video"] == ["a.mp4", "a.mp4", "a.mp4", "b.mp4"]
    assert rows["query"] == ["Q1", "Q1", "Q1", "Q2"]
    pieces = [Chunk.from_row({name: rows[name][n] for name in rows}) for n in range(4)]
    assert pieces[:3] == OverlappedChunks().cut("a.mp4", 48, TALK, "Q1")
    assert pieces[0].to_row() == {name: rows[name][0] for name in rows}


@settings(max_examples=60)
@given(st.lists(st.floats(0, 99.999), max_size=30), st.sampled_from([0.5, 1.0, 0.7]), st.floats(0.1, 60))
def test_every_word_is_said_once_in_its_second(times: list[float], round_s: float, start: float) -> None:
    words = tuple(Word(t, t, f"w{n}") for n, t in enumerate(sorted(start + t / 10 for t in times)))
    rounds = seconds(Chunk("a", start, start + 10, "q", "", words), round_s)
    assert [round_.start for round_ in rounds[1:]] == [round_.end for round_ in rounds[:-1]]
    assert (rounds[0].start, rounds[-1].end) == (start, start + 10)
    assert " ".join(r.reply.removesuffix(" ...") for r in rounds).split() == [word.text for word in words]
    for word in words:
        (said,) = [r for r in rounds if word.text in r.reply.split()]
        assert said.start <= word.start < said.end


def test_silence_questions_and_answers() -> None:
    piece = Chunk(
        "a", 2, 5, "q", "", (Word(2.1, 2.2, "one"), Word(2.9, 3.1, "two")), (Asked("x", 4.5, "Who?", "She."),)
    )
    rounds = seconds(piece)
    assert [(r.question, r.reply) for r in rounds] == [("", "one two ..."), ("", " ..."), ("Who?", "She. ...")]


@settings(max_examples=60)
@given(st.lists(st.text("abcdé球", min_size=1, max_size=9), max_size=60), st.integers(0, 20), st.integers(0, 20))
def test_what_came_before_keeps_its_first_and_last_tokens(words: list[str], sink: int, window: int) -> None:
    text = " ".join(words)
    ids = _TOKENIZER(text, add_special_tokens=False)["input_ids"]
    kept = capped(text, _TOKENIZER, sink, window)
    if len(ids) <= sink + window:
        assert kept == text
        return
    head = _TOKENIZER.decode(ids[:sink]).strip("\ufffd ")
    tail = _TOKENIZER.decode(ids[len(ids) - window :] if window else []).strip("\ufffd ")
    assert kept.startswith(head)
    assert kept.endswith(tail)
    assert len(kept) <= len(head) + len(tail) + 3  # a blank between, and a letter of several bytes on either side


_TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OverlappedChunks(12, 12), "overlap_s < window_s"),
        (lambda: OverlappedChunks(float("nan")), "overlap_s < window_s"),
        (lambda: OverlappedChunks(min_words=-1), "min_words"),
        (lambda: Chunk("a", 2, 2, "", "", ()), "start < end"),
        (lambda: Chunk("a", 0, 2, "", "", (Word(2, 2, "x"),)), "from 0 to 2 s"),
        (lambda: Chunk("a", 0, 2, "", "", (Word(1, 1, "x"), Word(0, 1, "y"))), "in order"),
        (lambda: Chunk("a", 0, 2, "", "", (), (Asked(None, 3, "", ""),)), "each question"),
        (lambda: capped("a", _TOKENIZER, -1, 2), "at least 0"),
    ],
)
def test_what_does_not_fit_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
