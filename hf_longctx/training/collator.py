"""Pieces of video and words as the inputs of a vision-language model, laid out as a streaming session lays them out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import UnsupportedError
from ..models import VISION, decoder_of, inspect_model
from ..streaming.chat import Chat, Turn
from ..streaming.frames import Frame
from ..streaming.settings import TIME
from ..streaming.source import frames
from .chunks import Chunk, Second, capped, seconds

Loader = Callable[[str, float, float], Sequence[Frame]]
"""Video, start and end in seconds, to frames whose times count from the start."""


class StreamCollator:
    """Collates rows of `Chunk.to_row` for `Trainer` (with `remove_unused_columns=False`).

    A piece becomes: the query; what was said before, as an answer without a question, its middle left out as the window
    leaves it out; and for each second a turn with its time and pictures, and the words as the answer. Labels are the
    answers of this piece, with the token that ends each. That is what `stream.Session` holds when it speaks; turns are
    made by the same code, with the model's own template and processor.

    Paper: StreamingVLM (arXiv:2510.09608) §3.2. Differs: what was said before is an answer, as in a session, not a turn
    of a role of its own.

    Args:
        model: the vision-language model that will be trained, before an adapter is put on it.
        processor: its own.
        fps: pictures a second.
        text_sink: first tokens of what was said before that stay.
        text_window: and last ones.
        max_pixels: of each picture; None leaves them.
        root: folder that paths of videos are relative to.
        system: words of the system; None: the template's.
        load: reads pictures; None reads video files.

    Raises:
        UnsupportedError: a model or a chat template that cannot be streamed.
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        fps: float = 2.0,
        text_sink: int = 512,
        text_window: int = 512,
        max_pixels: int | None = None,
        root: str | os.PathLike[str] = ".",
        system: str | None = None,
        load: Loader | None = None,
    ) -> None:
        _, base = decoder_of(model)
        facts = inspect_model(model).vision
        if facts is None:
            raise UnsupportedError(
                f"StreamCollator: expected a vision-language model ({', '.join(VISION)}); got "
                f"{type(model).__name__}. Choose one of these."
            )
        if fps < 1:
            raise ValueError(f"StreamCollator: expected fps >= 1, a picture for each second; got {fps:g}.")
        self._chat, self._tokenizer, self._axes = Chat(base, processor, facts), processor.tokenizer, facts.axes
        self._fps, self._caps, self._max_pixels = fps, (text_sink, text_window), max_pixels
        self._root, self._system, self._load = Path(root), system, load or self._read
        pad = self._tokenizer.pad_token_id
        self._pad = self._tokenizer.eos_token_id if pad is None else pad
        capped("", self._tokenizer, text_sink, text_window)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The inputs of one batch.

        Args:
            rows: as of `Chunk.to_row`.

        Returns:
            `input_ids`, `attention_mask`, `labels` `[B, T]`, padded on the right, `mm_token_type_ids` where the model
            takes them, and what its vision tower reads.

        Raises:
            FileNotFoundError: a video that is not there.
            ValueError: one that cannot be read, or ends before its piece.
        """
        chunks = [Chunk.from_row(row) for row in rows]
        rounds = [seconds(chunk) for chunk in chunks]
        turns = [turn for chunk, each in zip(chunks, rounds, strict=True) for turn in self._turns(chunk, each)]
        encoded = self._chat.encode(turns)
        kinds = encoded.kinds or [[0] * len(ids) for ids in encoded.ids]
        of_turns = iter(zip(encoded.ids, kinds, strict=True))
        made = [self._row(chunk, each, of_turns) for chunk, each in zip(chunks, rounds, strict=True)]
        longest = max(len(ids) for ids, _, _ in made)
        filled = {
            "input_ids": [ids + [self._pad] * (longest - len(ids)) for ids, _, _ in made],
            "attention_mask": [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _, _ in made],
            "labels": [labels + [-100] * (longest - len(labels)) for _, labels, _ in made],
            "mm_token_type_ids": [kinds + [0] * (longest - len(kinds)) for _, _, kinds in made],
        }
        if self._axes == 1:
            del filled["mm_token_type_ids"]
        return {**{name: torch.tensor(value) for name, value in filled.items()}, **encoded.vision}

    def _row(self, chunk: Chunk, rounds: Sequence[Second], of_turns: Any) -> tuple[list[int], list[int], list[int]]:
        """Tokens, labels and kinds of one piece; takes its turns off the iterator."""
        ids = self._chat.opening(self._system, chunk.query)
        previous = capped(chunk.previous, self._tokenizer, *self._caps)
        if previous:
            ids = ids + self._chat.prompt + self._words(previous) + self._chat.closing
        labels, kinds = [-100] * len(ids), [0] * len(ids)
        for second in rounds:
            turn, kind = next(of_turns)
            words = self._words(second.reply)
            asked, closing = [*turn, *self._chat.prompt], self._chat.closing
            ids = ids + asked + words + closing
            labels += [-100] * len(asked) + words + closing[:1] + [-100] * len(closing[1:])
            kinds += kind + [0] * (len(ids) - len(kinds) - len(kind))
        return ids, labels, kinds

    def _words(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _turns(self, chunk: Chunk, rounds: Sequence[Second]) -> list[Turn]:
        """The user's side of a piece."""
        shown = self._load(chunk.video, chunk.start, chunk.end)
        made = []
        for second in rounds:
            begin, end = second.start - chunk.start, second.end - chunk.start
            here = [frame for frame in shown if begin - 1e-6 <= frame.t < end - 1e-6]
            if not here:
                raise ValueError(
                    f"StreamCollator: expected pictures of {chunk.video} from {second.start:g} to {second.end:g} s; "
                    f"got none. Is the video shorter than its piece, which ends at {chunk.end:g} s?"
                )
            times = [chunk.start + frame.t for frame in here]
            text = " ".join(part for part in (TIME.format(second.start, second.end), second.question) if part)
            made.append(Turn(text, [frame.image for frame in here], times, second.end - second.start))
        return made

    def _read(self, video: str, start: float, end: float) -> Sequence[Frame]:
        source = frames(self._root / video, self._fps, start_s=start, stop_s=end, max_pixels=self._max_pixels)
        with source:
            return list(source)
