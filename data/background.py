"""Threads that fetch ahead. They are daemons: a process never waits at its exit for a slow disk or network.

`concurrent.futures` joins its threads at exit, which is why it is not used here.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class DaemonPool:
    """Up to `num_threads` daemon threads, started as they are needed; work is done in the order it was submitted."""

    def __init__(self, num_threads: int, name: str):
        self._limit = num_threads
        self._name = name
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = (
            queue.SimpleQueue()
        )
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._num_open = 0  # submitted and not done

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """`function(*args)` in some thread; its exception, too, arrives through the future."""
        future: Future[T] = Future()
        self._work.put((future, function, args))
        with self._lock:
            self._num_open += 1
            if len(self._threads) < min(self._limit, self._num_open):
                thread = threading.Thread(target=self._serve, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def close(self) -> None:
        """Lets the threads end after the work that is waiting."""
        for _ in self._threads:
            self._work.put(None)
        self._threads.clear()

    def _serve(self) -> None:
        while (item := self._work.get()) is not None:
            self._do(*item)
            del item  # An idle thread must not keep the last block alive.

    def _do(self, future: Future[T], function: Callable[..., T], args: tuple[Any, ...]) -> None:
        try:
            if future.set_running_or_notify_cancel():
                future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)
        finally:
            with self._lock:
                self._num_open -= 1


class PerProcess:
    """Objects made on first use in each process: nothing with threads or sockets crosses a fork."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._made: dict[Any, Any] = {}
        os.register_at_fork(after_in_child=self._forget)

    def get(self, key: Any, make: Callable[[], T]) -> T:
        """The object under `key`, made by `make` if this process has none."""
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            return self._made[key]

    def drop(self, key: Any, made: Any = None) -> None:
        """Forgets the object under `key`, e.g. a client whose credentials have expired; with `made`, that one only."""
        with self._lock:
            if made is None or self._made.get(key) is made:
                self._made.pop(key, None)

    def drop_all(self, first: str) -> None:
        """Forgets every object whose key is a tuple that begins with `first`."""
        with self._lock:
            for key in [key for key in self._made if isinstance(key, tuple) and key[0] == first]:
                del self._made[key]

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._made = {}


PER_PROCESS = PerProcess()
