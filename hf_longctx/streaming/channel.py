"""A bounded queue between the thread that reads frames and the one that needs them."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):
    """Nobody will take what is put; ends the reading thread, and is never seen by a caller."""


class Channel(Generic[T]):
    """Items in order, at most `size` of them, from one thread to another.

    Args:
        size: items that wait at most.
        drop: when it is full: True forgets the oldest item, False lets the reader wait.

    Attributes:
        dropped: items forgotten.
    """

    def __init__(self, size: int, drop: bool) -> None:
        self.dropped = 0
        self._size, self._drop = size, drop
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None

    def put(self, item: T) -> None:
        """Add an item; raises `Closed` when nobody reads any more."""
        with self._changed:
            while len(self._items) >= self._size and not self._drop and not self._closed:
                self._changed.wait()
            if self._closed:
                raise Closed
            if len(self._items) >= self._size:
                self._items.popleft()
                self.dropped += 1
            self._items.append(item)
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """No more items; `error` is raised by `get` after the last one."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        """Forget what waits, and stop the other thread at its next `put`."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """Items that wait."""
        return len(self._items)

    def ready(self, timeout: float) -> bool:
        """Wait until there is an item or an end; False if there is neither after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._items) or self._ended or self._closed, timeout)

    def get(self) -> T:
        """The next item of a channel that is `ready`.

        Raises:
            StopIteration: all have been read, or the channel was closed.
            BaseException: whatever `end` was given, once, after the last item.
        """
        with self._changed:
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopIteration
