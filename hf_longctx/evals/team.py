"""The processes that `accelerate launch` started, each with a model of its own: who does what, and who writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from ..errors import UnsupportedError

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """One process of several.

    Args:
        index: of this one; 0 writes what is written once.
        count: of all.
    """

    index: int = 0
    count: int = 1

    @property
    def writes(self) -> bool:
        """True in the one process that writes what all have found."""
        return self.index == 0

    def share(self, parts: Sequence[T]) -> list[T]:
        """What this process does of the whole."""
        return list(parts[self.index :: self.count])

    def agree(self, run: Callable[[], T]) -> T:
        """Run something in all processes, and go on when all have; if it fails in one, it has failed in all."""
        if self.count == 1:
            return run()
        found: T | None = None
        problem: Exception | None = None
        try:
            found = run()
        except Exception as error:
            problem = error
        said = gather_object([None if problem is None else f"{type(problem).__name__}: {problem}"])
        if problem is not None:
            raise problem
        other = next((each for each in said if each is not None), None)
        if other is not None:
            raise RuntimeError(f"processes: expected all to go on; got {other} in another one. Its message says more.")
        return found  # type: ignore[return-value]

    def gather(self, rows: list[T]) -> list[T]:
        """What all processes have, in all of them."""
        return rows if self.count == 1 else list(gather_object(rows))


def team_of(model: Any, where: str) -> Team:
    """This process among those that were started.

    Raises:
        UnsupportedError: the processes have one model among them.
    """
    state = PartialState()
    if state.num_processes > 1 and (getattr(model, "_tp_size", None) or 1) > 1:
        raise UnsupportedError(
            f"{where}: expected a whole model in each of {state.num_processes} processes, which share the trials; got "
            "one that is split by tensor parallelism. Load it without, or use one process and device_map='auto'."
        )
    return Team(state.process_index, state.num_processes)


def place(device: str) -> str:
    """Where to load the model: `auto` in one of several processes is that process's own device."""
    state = PartialState(cpu=True) if device == "cpu" else PartialState()
    return str(state.device) if device == "auto" and state.num_processes > 1 else device


def first() -> bool:
    """True in the one process that says and writes what all have found."""
    return bool(PartialState().is_main_process)


def alone(where: str) -> None:
    """Refuse several processes where there is one thing to do.

    Raises:
        UnsupportedError: there are several.
    """
    count = PartialState().num_processes
    if count > 1:
        raise UnsupportedError(
            f"{where}: expected one process, because it reads one text or stream from its start to its end; got "
            f"{count}. Leave out accelerate launch."
        )
