"""The input of a run: regions read ahead by a thread. Enter at `Feed`."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ranger_nn.core.reach import Box
from ranger_nn.execute.files.framework import Tensor
from ranger_nn.io.protocol import Array

AHEAD = 1
"""Regions that are read, and written, beside the one that is computed."""


class Feed:
    """The input: regions in the order in which the program reads them, one read ahead.

    Args:
        boxes: regions of the input value, in order.
        read: gives the array of a region, ready for the model.
        tensor: makes it a tensor of the model's.
    """

    def __init__(self, boxes: Iterable[Box], read: Callable[[Box], Array], tensor: Callable[[Array], Tensor]) -> None:
        self.waited = 0.0
        self._tensor = tensor
        self._queue: queue.Queue[Any] = queue.Queue(AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(list(boxes), read), name="ranger-reader", daemon=True)
        self._thread.start()

    def _work(self, boxes: Sequence[Box], read: Callable[[Box], Array]) -> None:
        for box in boxes:
            try:
                item: Any = (box, read(box))
            except BaseException as error:
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if self._stop.is_set() or isinstance(item, BaseException):
                return
            del item

    def load(self, box: Box) -> Tensor:
        """The next region, which must be this one."""
        start = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        if item[0] != box:
            raise AssertionError(f"region {box} was asked for, {item[0]} was read ahead")
        return self._tensor(item[1])

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        self._thread.join()
