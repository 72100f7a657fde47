"""The failure cases and the properties, and that a test of each carries its name.

``test_f09_...`` tests case f09, ``test_f03_f26_...`` two. The cases are what broke other
implementations of involution, or of operators like it.
"""

import ast
import functools
import itertools
import re

import pytest

from involution.ops import native
from tests.support.backends import BACKEND
from tests.support.paths import TESTS

CASES = {
    "f01": "a stride does not divide the height or the width",
    "f02": "sizes are unknown when a model is built, or change from call to call",
    "f03": "converted weights have every shape right and the channels in other groups",
    "f04": "the height is not the width",
    "f05": "windows are even, not square, larger than the input, or one position",
    "f06": "groups do not divide the channels, or a group has more channels than there are",
    "f07": "the drop-in's `channel` is not the number of the input's channels",
    "f08": "half precision, also mixed; a sum leaves its range and comes back",
    "f09": "the gradient that arrives does not lie in memory in order",
    "f10": "inputs do not lie in order: transposed, expanded, views, axes of one",
    "f11": "there are more than 2**31 elements",
    "f12": "a window, a dilation, a stride or a padding is absurd",
    "f13": "the batch is empty, or a dimension",
    "f14": "a new batch size needs a new program",
    "f15": "something private of a dependency is used, and goes away",
    "f16": "tensors lie on a device that an implementation does not know",
    "f17": "a derivative of second order is lost in silence",
    "f18": "the bits differ from run to run",
    "f19": "threads meet in a way that only many repeats show",
    "f20": "what is not finite gets in from outside the window",
    "f21": "a gradient of zero gives something else than zero",
    "f22": "PyTorch's compiler breaks the graph, or is told wrong or fixed shapes",
    "f23": "mapped over an axis, or differentiated forwards",
    "f24": "the shape told before a call is not the shape of its result",
    "f25": "batch normalization in half precision, frozen, of one place, on another axis",
    "f26": "converted weights get other epsilons, momenta, paddings, pooling or statistics",
    "f27": "a saved layer loads with another configuration or type, or not by itself",
    "f28": "an input changes before its gradient is taken, or the output shares its memory",
    "f29": "another implementation runs than the one named",
    "f30": "eight threads call one layer",
    "p01": "it equals the oracle to half an ulp and what the sum's rounding may lose",
    "p02": "a kernel that is the same at all places makes a depthwise convolution",
    "p03": "a window of one position makes a product",
    "p04": "it is linear in both inputs, and its gradients are adjoint",
    "p05": "shifting the input and the kernel shifts the output",
    "p06": "permuting groups permutes channels",
    "p07": "a sample alone has the bits that it has in a batch",
    "p08": "channels_first is channels_last, transposed",
    "p09": "dilation is subsampling of the input",
    "p10": "a stride is subsampling of the output",
    "p11": "a side of one is a dimension less",
    "p12": "another backend computes the same",
    "p13": "what is not finite stays within the windows that hold it",
    "p14": "invalid arguments raise before anything runs",
}
# PyTorch's compiler is PyTorch's.
HERE = [case for case in CASES if case != "f22" or BACKEND == "torch"]


@functools.cache
def functions():
    """Those of all tests that this backend runs, by the syntax trees of their files."""
    others = {f"native/test_{name}.py" for name in native.BINDINGS if name != BACKEND}
    files = TESTS.rglob("test_*.py")
    trees = (
        ast.parse(f.read_text(encoding="utf-8"))
        for f in files
        if f.relative_to(TESTS).as_posix() not in others
    )
    nodes = itertools.chain.from_iterable(map(ast.walk, trees))
    defined = (node for node in nodes if isinstance(node, ast.FunctionDef))
    return [node for node in defined if node.name.startswith("test_")]


def cases_of(function):
    (numbers,) = re.match(r"test((?:_[fp]\d+(?=_))*)", function.name).groups()
    return numbers.split("_")[1:]


def is_slow(function):
    return any(ast.unparse(d) == "pytest.mark.slow" for d in function.decorator_list)


@pytest.mark.parametrize("case", HERE)
def test_every_case_has_a_test_in_the_regular_run(case):
    names = [f.name for f in functions() if case in cases_of(f) and not is_slow(f)]
    print(f"{case}, {CASES[case]}: {', '.join(names)}")
    assert names


def test_every_test_of_a_case_names_one_that_there_is():
    for function in functions():
        assert set(cases_of(function)) <= set(CASES), function.name
