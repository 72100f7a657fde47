"""Numbered requirements, each of which must have a test.

``test_f09_...`` covers requirement f09, ``test_f03_f26_...`` covers f03 and f26. f01 to f30 are
failure cases, known from other implementations of involution or of similar operators; p01 to p14
are properties of the operator.
"""

import ast
import functools
import itertools
import re

import pytest

from involution.ops import native
from tests.support.backends import BACKEND
from tests.support.paths import TESTS

REQUIREMENTS = {
    "f01": "the stride does not divide the height or the width",
    "f02": "sizes are unknown when a model is built, or differ between calls",
    "f03": "converted weights have the right shapes, but the channels are in the wrong groups",
    "f04": "the height differs from the width",
    "f05": "window sizes are even, not square, larger than the input, or one",
    "f06": "`groups` does not divide the channels, or `group_channels` exceeds them",
    "f07": "the drop-in's `channel` differs from the input's channels",
    "f08": "half and mixed precision; a partial sum exceeds the range of the dtype",
    "f09": "the output gradient is not contiguous",
    "f10": "inputs are not contiguous: transposed, expanded, views, axes of size one",
    "f11": "tensors have more than 2**31 elements",
    "f12": "a window, dilation, stride or padding is absurdly large",
    "f13": "the batch or another dimension is empty",
    "f14": "a new batch size causes a recompilation",
    "f15": "a private name of a dependency is used and later removed",
    "f16": "tensors are on a device that an implementation does not support",
    "f17": "a second-order derivative is silently dropped",
    "f18": "results are not bitwise reproducible",
    "f19": "a race condition that shows only in many repetitions",
    "f20": "non-finite values outside the window affect the output",
    "f21": "an output gradient of zero gives nonzero input gradients",
    "f22": "graph breaks, wrong shapes or static shapes in PyTorch's compiler",
    "f23": "vmap and forward-mode differentiation",
    "f24": "the symbolic output shape differs from the shape of the result",
    "f25": "batch normalization in half precision, frozen, of one position, on another axis",
    "f26": "converted weights get the wrong epsilon, momentum, padding, pooling or statistics",
    "f27": "a saved layer loads with another configuration or dtype, or needs `custom_objects`",
    "f28": "an input changes before the backward pass, or shares memory with the output",
    "f29": "another implementation runs than the requested one",
    "f30": "eight threads call one layer concurrently",
    "p01": "the error against the oracle is at most half an ulp plus the rounding error of the sum",
    "p02": "a kernel that is equal at all positions gives a depthwise convolution",
    "p03": "a window of one position gives an elementwise product",
    "p04": "the operator is linear in each input, and its gradients are the adjoints",
    "p05": "shifting the input and the kernel shifts the output",
    "p06": "permuting groups permutes channels",
    "p07": "the result of a sample does not depend on the batch, bit for bit",
    "p08": "channels_first equals channels_last, transposed",
    "p09": "dilation equals subsampling of the input",
    "p10": "a stride equals subsampling of the output",
    "p11": "a dimension of size one can be removed",
    "p12": "backends compute the same",
    "p13": "non-finite values affect only the windows that contain them",
    "p14": "invalid arguments raise before any computation",
}
# f22 concerns PyTorch's compiler.
APPLICABLE = [number for number in REQUIREMENTS if number != "f22" or BACKEND == "torch"]
# Markers of tests that `make test` deselects.
OTHER_TARGETS = ("slow", "cuda", "browser", "example")


@functools.cache
def collected_tests():
    """Syntax trees of the test functions that run on this backend."""
    others = {f"native/test_{name}.py" for name in native.BINDINGS if name != BACKEND}
    files = TESTS.rglob("test_*.py")
    texts = (
        f.read_text(encoding="utf-8")
        for f in files
        if f.relative_to(TESTS).as_posix() not in others
    )
    marked = rf"^pytestmark = .*\b({'|'.join(OTHER_TARGETS)})\b"
    trees = (ast.parse(text) for text in texts if not re.search(marked, text, re.MULTILINE))
    nodes = itertools.chain.from_iterable(map(ast.walk, trees))
    defined = (node for node in nodes if isinstance(node, ast.FunctionDef))
    return [node for node in defined if node.name.startswith("test_")]


def requirements_of(function):
    (numbers,) = re.match(r"test((?:_[fp]\d+(?=_))*)", function.name).groups()
    return numbers.split("_")[1:]


def is_in_make_test(function):
    marks = {ast.unparse(d).removeprefix("pytest.mark.") for d in function.decorator_list}
    return marks.isdisjoint(OTHER_TARGETS)


@pytest.mark.parametrize("number", APPLICABLE)
def test_every_requirement_has_a_test_in_make_test(number):
    functions = [f for f in collected_tests() if number in requirements_of(f)]
    names = [f.name for f in functions if is_in_make_test(f)]
    print(f"{number}, {REQUIREMENTS[number]}: {', '.join(names)}")
    assert names


def test_every_numbered_test_names_an_existing_requirement():
    for function in collected_tests():
        assert set(requirements_of(function)) <= set(REQUIREMENTS), function.name
