"""Plans kept from call to call: the ones used last. Enter at `Recent`."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")
PLANS = 32
"""Plans that one wrapper keeps. A plan of a large network takes some megabytes of Python objects, and seconds to make."""


class Recent(Generic[T]):
    """Values by key; of more than `limit` the one that was not used for longest is forgotten."""

    def __init__(self, limit: int = PLANS) -> None:
        """Empty."""
        self._limit = limit
        self._items: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()
        self._making = threading.Lock()

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._items)

    def values(self) -> list[T]:
        """Those that are kept, the one used last at the end."""
        with self._lock:
            return list(self._items.values())

    def get(self, key: Hashable) -> T | None:
        """The value, which counts as used, or None."""
        with self._lock:
            if key not in self._items:
                return None
            self._items.move_to_end(key)
            return self._items[key]

    def put(self, key: Hashable, value: T) -> T:
        """Keep a value."""
        with self._lock:
            self._items[key] = value
            self._items.move_to_end(key)
            while len(self._items) > self._limit:
                self._items.popitem(last=False)
        return value

    def get_or_make(self, key: Hashable, make: Callable[[], T], good: Callable[[T], bool]) -> T:
        """The value if there is a good one, else what `make` gives: made once, whoever else asks for it meanwhile waits."""
        value = self.get(key)
        if value is not None and good(value):
            return value
        with self._making:
            value = self.get(key)
            return value if value is not None and good(value) else self.put(key, make())
