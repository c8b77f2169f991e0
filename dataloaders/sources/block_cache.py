"""What was read last of large files, kept whole: row groups, volumes. One budget of bytes for the whole process."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

BUDGET_BYTES = 2**29


class BlockCache:
    """Keeps blocks up to a budget, the one that was used longest ago goes first; safe from many threads.

    A block that several threads want at once is made by one of them. One that is larger than the budget is kept until
    the next is made.
    """

    def __init__(self, budget: int = BUDGET_BYTES) -> None:
        self.budget, self.bytes = budget, 0
        self._blocks: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, key: Hashable, make: Callable[[], tuple[Any, int]]) -> Any:
        """The block of ``key``, which ``make`` returns with its bytes. Where `make` raises, nothing is kept."""
        with self._lock:
            if (known := self._blocks.get(key)) is not None:
                self._blocks.move_to_end(key)
                return known[0]
            mine = self._making.setdefault(key, threading.Lock())
        with mine:
            with self._lock:
                if (known := self._blocks.get(key)) is not None:
                    return known[0]
            try:
                block, size = make()
                with self._lock:
                    self._blocks[key] = block, size
                    self.bytes += size
                    while self.bytes > self.budget and len(self._blocks) > 1:
                        self.bytes -= self._blocks.popitem(last=False)[1][1]
                return block
            finally:
                with self._lock:
                    self._making.pop(key, None)

    def forget(self, belongs: Callable[[Any], bool]) -> None:
        """Drops the blocks whose key ``belongs`` says yes to."""
        with self._lock:
            for key in [key for key in self._blocks if belongs(key)]:
                self.bytes -= self._blocks.pop(key)[1]


BLOCKS = BlockCache()
