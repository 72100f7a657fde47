"""Work ahead of the one who wants it."""

import threading

import pytest

from involution.data.prefetch import ahead


def test_all_come_in_order():
    assert list(ahead(str, range(7))) == list("0123456")
    assert list(ahead(str, [])) == []


def test_it_works_ahead_but_not_further_than_it_was_told():
    made, third = [], threading.Event()

    def make(item):
        made.append(item)
        if item == 2:
            third.set()
        return item

    results = ahead(make, range(100), depth=2)
    assert next(results) == 0
    assert third.wait(10)
    assert made == [0, 1, 2]
    assert next(results) == 1
    results.close()
    assert len(made) <= 4


def test_an_error_comes_in_its_turn():
    results = ahead(lambda n: 1 // n, [1, 1, 0, 1])
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
