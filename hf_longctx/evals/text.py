"""Real English text: the one that ships with the package, or a file."""

from __future__ import annotations

import hashlib
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch


def shipped() -> str:
    """Four Annual Messages to the Congress of the United States, 1953-1956: public domain, 185 KB, about 37,000 tokens.

    The file has a line per sentence and an empty line between messages; the text has spaces and paragraphs instead.
    """
    lines = files(__package__).joinpath("data/eisenhower.txt").read_text(encoding="utf-8").strip()
    return "\n\n".join(message.replace("\n", " ") for message in lines.split("\n\n"))


def read(path: str | os.PathLike[str] | None = None) -> str:
    """The text of a UTF-8 file, or the shipped one.

    Args:
        path: a text file; None means the text that ships with the package.

    Returns:
        The text, never empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, not UTF-8, or holds nothing but white space.
    """
    if path is None:
        return shipped()
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"text: expected a UTF-8 text file; got {source}, which does not exist.")
    if source.is_dir():
        raise ValueError(f"text: expected a UTF-8 text file; got the folder {source}. Name one file in it.")
    try:
        text = source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text: expected UTF-8 in {source}; got byte 0x{error.object[error.start]:02x} at offset {error.start}. "
            f"Convert it: iconv -f ENCODING -t utf-8 {source.name}"
        ) from error
    if not text.strip():
        raise ValueError(f"text: expected words in {source}; got {len(text)} characters of white space.")
    return text


def digest(text: str) -> str:
    """SHA-256 of a text, which tells two files of one name apart."""
    return hashlib.sha256(text.encode()).hexdigest()


def about(path: str | os.PathLike[str] | None, text: str) -> dict[str, str]:
    """Name and content of a text, for a result file: no path of any machine."""
    return {"text": Path(path).name if path else "shipped", "text_sha256": digest(text)}


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without the tokens that open or close a sequence and without a warning about its length."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def opening_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: the begin-of-sequence token, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def stream_ids(tokenizer: Any, text: str, tokens: int | None = None) -> torch.Tensor:
    """The first tokens of a text as one sequence, begin-of-sequence token included where the model has one.

    Args:
        tokenizer: a transformers tokenizer.
        text: the text. It is never repeated: a model that copies would look better than it is.
        tokens: how many; None takes all.

    Returns:
        `[tokens]`, int64, on the CPU.

    Raises:
        ValueError: the text is shorter than that, or there are fewer than two tokens, so that nothing is predicted.
    """
    ids = opening_ids(tokenizer) + token_ids(tokenizer, text)
    if tokens is not None and tokens > len(ids):
        raise ValueError(
            f"text: expected at least {tokens:,} tokens; got {len(ids):,}. Pass a longer text or fewer tokens."
        )
    ids = ids[:tokens]
    if len(ids) < 2:
        raise ValueError(f"text: expected at least 2 tokens; got {len(ids)}. Pass a longer text or more tokens.")
    return torch.tensor(ids, dtype=torch.long)
