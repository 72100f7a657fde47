"""Prefetching in a background thread."""

import threading

import pytest

from involution.data.prefetch import prefetch


def test_results_are_in_order():
    assert list(prefetch(str, range(7))) == list("0123456")
    assert list(prefetch(str, [])) == []


def test_depth_bounds_the_results_computed_ahead():
    computed, third = [], threading.Event()

    def fn(item):
        computed.append(item)
        if item == 2:
            third.set()
        return item

    results = prefetch(fn, range(100), depth=2)
    assert next(results) == 0
    assert third.wait(10)
    assert computed == [0, 1, 2]
    assert next(results) == 1
    results.close()
    assert len(computed) <= 4


def test_exception_is_raised_at_its_item():
    results = prefetch(lambda n: 1 // n, [1, 1, 0, 1])
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
