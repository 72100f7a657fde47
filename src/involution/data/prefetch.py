"""Work that is done ahead of the one who wants it."""

import collections
import concurrent.futures
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    make: Callable[[Item], Result], items: Iterable[Item], depth: int = 2
) -> Generator[Result]:
    """``make`` of each item, in order; a thread of its own works on the next ``depth`` of them
    while one is in use. An error comes when it is that item's turn."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        waiting: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
        try:
            for item in items:
                waiting.append(thread.submit(make, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
