"""Numbered requirements, each of which must have a test that `make test` runs on some backend.

``test_f09_...`` covers requirement f09, ``test_f03_f26_...`` covers f03 and f26. f01 to f30 are
failure modes of other implementations of involution or similar operators; p01 to p14 are properties
of the operator.
"""

import ast
import functools
import itertools
import re

import pytest

from tests.support.paths import TESTS

pytestmark = pytest.mark.any_backend

REQUIREMENTS = {
    "f01": "the stride does not divide the height or width",
    "f02": "spatial sizes are dynamic: unknown at build time, or different between calls",
    "f03": "converted weights have correct shapes, but channels in the wrong groups",
    "f04": "the height differs from the width",
    "f05": "the kernel size is even, not square, larger than the input, or one",
    "f06": "`groups` does not divide the number of channels, or `group_channels` exceeds it",
    "f07": "`channel` of the drop-in layer differs from the number of input channels",
    "f08": "half and mixed precision; a partial sum overflows the dtype",
    "f09": "the output gradient is not contiguous",
    "f10": "inputs are not contiguous: transposed, expanded, views, dimensions of size one",
    "f11": "tensors have more than 2**31 elements",
    "f12": "a kernel size, dilation rate, stride or padding is extremely large",
    "f13": "the batch or another dimension is empty",
    "f14": "a new batch size triggers recompilation",
    "f15": "a private API of a dependency is used, and later removed",
    "f16": "tensors are on a device that the implementation does not support",
    "f17": "a second-order derivative is silently dropped",
    "f18": "results are not bitwise reproducible",
    "f19": "a race condition that appears only after many repetitions",
    "f20": "non-finite values outside the window affect the output",
    "f21": "a zero output gradient gives nonzero input gradients",
    "f22": "torch.compile: graph breaks, wrong shapes, or specialization to static shapes",
    "f23": "vmap and forward-mode differentiation",
    "f24": "the symbolic output shape differs from the actual shape",
    "f25": "batch normalization: half precision, frozen, a single position, a non-default axis",
    "f26": "conversion sets the wrong epsilon, momentum, padding, pooling or moving statistics",
    "f27": "loading a saved layer changes its configuration or dtype, or needs `custom_objects`",
    "f28": "an input is modified before the backward pass, or aliases the output",
    "f29": "an implementation other than the requested one runs",
    "f30": "eight threads call one layer concurrently",
    "p01": "the operator's error is at most half an ulp plus the rounding error of the sum",
    "p02": "with a spatially constant kernel, the operator equals a depthwise convolution",
    "p03": "with a kernel size of one, the operator equals an elementwise product",
    "p04": "the operator is linear in each input, and its gradients are the adjoints",
    "p05": "translating the input and the kernel translates the output",
    "p06": "permuting groups permutes channels",
    "p07": "the result of a sample is bit-identical in every batch",
    "p08": "channels_first and channels_last give equal results, transposed",
    "p09": "dilation is equivalent to subsampling the input",
    "p10": "a stride is equivalent to subsampling the output",
    "p11": "removing a dimension of size one does not change the result",
    "p12": "all backends compute the same result",
    "p13": "non-finite values affect only the windows that contain them",
    "p14": "invalid arguments raise before any computation",
}
# Markers of tests that `make test` deselects.
OTHER_TARGETS = ("slow", "cuda", "browser", "example")


@functools.cache
def collected_tests():
    """Syntax trees of all test functions."""
    texts = (file.read_text(encoding="utf-8") for file in TESTS.rglob("test_*.py"))
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


@pytest.mark.long
@pytest.mark.parametrize("number", REQUIREMENTS)
def test_every_requirement_has_a_test_in_make_test(number):
    functions = [f for f in collected_tests() if number in requirements_of(f)]
    names = [f.name for f in functions if is_in_make_test(f)]
    print(f"{number}, {REQUIREMENTS[number]}: {', '.join(names)}")
    assert names


def test_every_numbered_test_names_an_existing_requirement():
    for function in collected_tests():
        assert set(requirements_of(function)) <= set(REQUIREMENTS), function.name
