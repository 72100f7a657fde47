"""Prefetching: the next items are computed in a thread while one is in use."""

import collections
import concurrent.futures
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    fn: Callable[[Item], Result], items: Iterable[Item], depth: int = 2
) -> Generator[Result]:
    """Yields ``fn(item)`` in the order of the items; one thread computes up to ``depth`` results
    ahead. An exception is raised at its item."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        pending: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
        try:
            for item in items:
                pending.append(thread.submit(fn, item))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
