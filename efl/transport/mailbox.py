"""Where what has arrived waits for whoever takes it, and where takers wait.

Not locked: the channel's lock guards every method but ``Slot.wait``.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from efl.errors import EflError

T = TypeVar("T")


class Slot(Generic[T]):
    """One waiting thread's place; receives one item or an error."""

    __slots__ = ("_queue", "key")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self._queue: queue.SimpleQueue[T | EflError] = queue.SimpleQueue()

    def put(self, item: T | EflError) -> None:
        """Wakes the thread with an item or an error."""
        self._queue.put(item)

    def wait(self, timeout: float | None) -> T | EflError | None:
        """The item, the error, or None when ``timeout`` seconds have passed."""
        try:
            return self._queue.get(timeout=timeout)
        except queue.Empty:
            return None


class Mailbox(Generic[T]):
    """Items by key, first in first out, and the threads that wait for a key."""

    def __init__(self) -> None:
        self._items: dict[Hashable, deque[tuple[T, int]]] = {}
        self._slots: dict[Hashable, deque[Slot[T]]] = {}
        self.unread = self.unread_bytes = 0

    def deliver(self, key: Hashable, item: T, size: int = 0) -> bool:
        """Hands ``item`` to the thread that waits for it, or keeps it and counts its ``size``.

        Returns:
          True when a thread has taken it.
        """
        slots = self._slots.get(key)
        if slots:
            slots.popleft().put(item)
            if not slots:
                del self._slots[key]
            return True
        self._items.setdefault(key, deque()).append((item, size))
        self.unread += 1
        self.unread_bytes += size
        return False

    def take(self, key: Hashable) -> T | None:
        """The oldest item of ``key``, or None."""
        items = self._items.get(key)
        if not items:
            return None
        item, size = items.popleft()
        self.unread -= 1
        self.unread_bytes -= size
        if not items:
            del self._items[key]
        return item

    def wait_for(self, key: Hashable) -> Slot[T]:
        """A place in the line of those who wait for ``key``."""
        slot: Slot[T] = Slot(key)
        self._slots.setdefault(key, deque()).append(slot)
        return slot

    def leave(self, slot: Slot[T]) -> bool:
        """Gives the place up. False when something has been put into it meanwhile."""
        slots = self._slots.get(slot.key)
        if not slots or slot not in slots:
            return False
        slots.remove(slot)
        if not slots:
            del self._slots[slot.key]
        return True

    def fail(self, make_error: Callable[[Hashable], EflError]) -> None:
        """Wakes every waiting thread with ``make_error(key)``."""
        for key, slots in self._slots.items():
            for slot in slots:
                slot.put(make_error(key))
        self._slots.clear()
