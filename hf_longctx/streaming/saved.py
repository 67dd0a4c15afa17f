"""A session in one file, to go on with later or elsewhere."""

from __future__ import annotations

import os
from typing import Any

from transformers import GenerationConfig

from ..session import read_notes
from ..session import save_session as save_cache
from .session import Session


def save_session(session: Session, path: str | os.PathLike[str]) -> None:
    """Write a session between two rounds, its cache included; what was there before stays until the file is complete.

    Args:
        session: inside its `with`.
        path: of the file; its folder must be there.

    Raises:
        RuntimeError: outside `with`, or after a turn that broke off.
    """
    save_cache(session.model, path, session.engine.cache, session.state())


def load_session(
    model: Any, processor: Any, path: str | os.PathLike[str], *, generation: GenerationConfig | None = None
) -> Session:
    """A session that goes on, inside its `with`, where the saved one stood.

    Args:
        model: a model like the one that it ran on.
        processor: its own.
        path: of the file.
        generation: as in `Session`; it is not in the file.

    Raises:
        ValueError: no such session, or one of a plain cache; inside `with`, one of another model.
        FileNotFoundError: there is no such file.
    """
    notes = read_notes(path)
    if "rows" not in notes:
        raise ValueError(
            f"stream.load_session: expected the file of a stream session; got that of a cache in '{os.fspath(path)}'. "
            "Read it with hf_longctx.load_session."
        )
    session = Session(model, processor, **notes["method"], **notes["settings"], generation=generation)
    session.saved = os.fspath(path)
    return session
