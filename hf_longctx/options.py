"""What the commands of `hf-longctx` share: options, and two small habits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Hub id, folder or .gguf file.", show_default="SmolLM2-135M-Instruct"),
]
Text = Annotated[
    Path | None, typer.Option("--text", help="UTF-8 text file.", show_default="a text that ships with the package")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N. auto takes CUDA if there is any.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")]


def quiet() -> None:
    """No bars of transformers where nobody watches: in a log they are a line each."""
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]


def names(listed: str) -> list[str]:
    """Names with commas between."""
    return [name.strip() for name in listed.split(",") if name.strip()]
