"""What a compiler (`torch.compile`) does not trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def between_graphs(why: str) -> Callable[[F], F]:
    """Decorate a function that runs as ever, between two graphs, where a compiler meets it; the compiler says why."""
    made: Callable[[F], F] = torch.compiler.disable(reason=f"hf_longctx: {why}")  # type: ignore[no-untyped-call]
    return made
