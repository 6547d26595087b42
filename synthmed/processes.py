"""Work spread over processes: results in the order of the work, and a crash costs one item.

Processes come from a server that has imported what they need and never ran a thread; a fork of the
program itself could hang on the threads of its numerical libraries.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import TypeVar

from synthmed.errors import ResourceError
from synthmed.inventory import available_memory, cores

T = TypeVar("T")
R = TypeVar("R")

MAX_PROCESSES = 16
MEMORY_EACH = 2 << 30
"""Bytes that reading one scan may take, hostile ones included."""


class Died:
    """Stands for the result of an item whose process died of it twice, the second time alone."""


def how_many() -> int:
    """Processes that this machine has cores and memory for."""
    memory = available_memory()
    fitting = memory // MEMORY_EACH if memory else MAX_PROCESSES
    return max(1, min(cores(), fitting, MAX_PROCESSES))


def spread(
    work: Callable[[T], R], items: Sequence[T], n: int, imports: Sequence[str] = ()
) -> Iterator[R | Died]:
    """The results of `work`, in the order of `items`; few are held at a time.

    Args:
        work: what can be pickled, as its items and results can. An error it raises is raised here.
        items: to work on.
        n: processes; with 1 all is done in this one, where nothing survives a crash.
        imports: modules that every process needs, imported once for all.
    """
    if n == 1:
        yield from map(work, items)
        return
    done = 0
    while done < len(items):
        for result in _until_broken(work, items[done:], n, imports):
            done += 1
            yield result
        if done < len(items):
            alone = list(_until_broken(work, items[done : done + 1], 1, imports))
            done += 1
            yield alone[0] if alone else Died()


def _until_broken(
    work: Callable[[T], R], items: Sequence[T], n: int, imports: Sequence[str]
) -> Iterator[R]:
    """Results in order, up to the first one that a process died before giving."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(imports))
    pool = ProcessPoolExecutor(n, context, initializer=_begin)
    waiting: deque[Future[R]] = deque()
    rest = iter(items)
    try:
        pool.submit(int).result()
    except BrokenProcessPool:
        pool.shutdown()
        raise ResourceError(
            "processes that read cannot be started",
            'A script that calls this needs `if __name__ == "__main__":` round its own work.',
        ) from None
    try:
        while True:
            try:
                for item in itertools.islice(rest, 4 * n - len(waiting)):
                    waiting.append(pool.submit(work, item))
                if not waiting:
                    return
                result = waiting.popleft().result()
            except BrokenProcessPool:
                return
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """Leave Ctrl-C to the program, files to their owner, and go when the program goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.umask(0o077)
    threading.Thread(target=_go_with_parent, daemon=True).start()


def _go_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
