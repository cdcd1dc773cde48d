"""The memory of a KV host: one budget in bytes, over all that its stores keep."""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from semgap.wire.link import Refused

Key = tuple[Any, ...]
Drop = Callable[[Key], None]


class Room:
    """Counts what is kept, and drops the least recently used of it once that is over the budget.

    A key that is held, by one holder or several, is not dropped. `lock` guards the stores over one room; hold it for every call.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = self.held_bytes = 0
        self.lock = threading.RLock()
        self._kept: OrderedDict[Key, tuple[int, Drop]] = OrderedDict()  # least recently used first
        self._holders: Counter[Key] = Counter()

    def counts(self) -> dict[str, int]:
        """The bytes that are kept, and those of them that somebody holds."""
        return {"used_bytes": self.used_bytes, "held_bytes": self.held_bytes}

    def require(self, nbytes: int) -> None:
        """Refused (budget) if so much cannot be kept, whatever is dropped for it."""
        if nbytes > self.budget_bytes:
            raise Refused("budget", f"{nbytes:,} bytes of blocks and their books are more than this KV host keeps, {self.budget_bytes:,}")
        if nbytes > self.budget_bytes - self.held_bytes:
            raise Refused("budget", f"{nbytes:,} bytes do not fit: of {self.budget_bytes:,} bytes {self.held_bytes:,} are in use now")

    def keep(self, key: Key, nbytes: int, drop: Drop) -> None:
        """Counts a key as the newest. `drop` is called with it if its memory is needed, and must `forget` it."""
        self._kept[key] = nbytes, drop
        self.used_bytes += nbytes

    def use(self, keys: Iterable[Key]) -> None:
        """Makes keys the newest, in this order."""
        for key in keys:
            self._kept.move_to_end(key)

    def forget(self, key: Key) -> None:
        """Counts a key no longer."""
        nbytes, _ = self._kept.pop(key)
        self.used_bytes -= nbytes

    def hold(self, keys: Iterable[Key]) -> None:
        """One holder more for each key."""
        for key in keys:
            self._holders[key] += 1
            if self._holders[key] == 1:
                self.held_bytes += self._kept[key][0]

    def let_go(self, keys: Iterable[Key]) -> None:
        """One holder less for each key."""
        for key in keys:
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
                self.held_bytes -= self._kept[key][0]

    def make(self) -> None:
        """Drops the least recently used keys, but for held ones, until all that is kept fits."""
        while self.used_bytes > self.budget_bytes:
            key, (_, drop) = next(kept for kept in self._kept.items() if kept[0] not in self._holders)
            drop(key)
