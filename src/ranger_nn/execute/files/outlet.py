"""What a run writes, done by one thread while the next region is computed. Enter at `Outlet`."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from ranger_nn.execute.files.feed import AHEAD


class Outlet:
    """Jobs done in order by one thread: rows written, journals saved. What fails there is raised here."""

    def __init__(self) -> None:
        self.waited = 0.0
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(AHEAD)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="ranger-writer", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._error is None:
                try:
                    job()
                except BaseException as error:
                    self._error = error

    def put(self, job: Callable[[], None]) -> None:
        """Do it after those before; wait while too many are waiting."""
        if self._error is not None:
            raise self._error
        start = time.perf_counter()
        self._queue.put(job)
        self.waited += time.perf_counter() - start

    def close(self, quiet: bool = False) -> None:
        """Wait for what was put; raise what failed, unless `quiet`."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and not quiet:
            raise self._error
