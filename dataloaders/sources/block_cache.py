"""Keep the blocks of large files that were read last: row groups, volumes. The process has one budget of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

BUDGET_BYTES = 2**29


class BlockCache:
    """The cache keeps blocks up to a budget; the block used longest ago goes first. Many threads may use it.

    A block that several threads want at once is made by one of them. A block that is larger than the budget is kept
    until the next is made.
    """

    def __init__(self, budget: int = BUDGET_BYTES) -> None:
        self.budget, self.bytes = budget, 0
        self._blocks: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, key: Hashable, make: Callable[[], tuple[Any, int]]) -> Any:
        """Return the block of ``key``; ``make`` makes it and counts its bytes. If `make` raises, nothing is kept."""
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
        """Drop the blocks for whose key ``belongs`` says yes."""
        with self._lock:
            for key in [key for key in self._blocks if belongs(key)]:
                self.bytes -= self._blocks.pop(key)[1]


BLOCKS = BlockCache()
