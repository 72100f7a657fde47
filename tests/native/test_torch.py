"""``native`` on PyTorch: compiled, exported, differentiated, on views, devices and threads."""

import dataclasses
import json
import os
import signal
import sys

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import involution
from involution.ops import dispatch, native
from involution.ops.autodiff import FORWARD, INPUT_GRAD, KERNEL_GRAD
from involution.ops.native import library, params
from involution.ops.native import torch as native_torch
from involution.ops.problem import problem_of
from involution.ops.window import Window
from tests.support import native_core
from tests.support.backends import (
    IMPLEMENTATIONS,
    assert_equals_oracle,
    fresh_process,
    operation,
    requires_native,
    tensors,
)
from tests.support.native_core import ARGUMENTS
from tests.support.oracle import Call

pytestmark = requires_native

CALL = Call(2, (4, 5), 6, (3, 2), (2, 1), "same", (1, 2), 3)
FIRST = dataclasses.replace(CALL, data_format="channels_first", group_layout="interleaved")
LINE = Call(2, (7,), 6, (4,), (1,), "symmetric", (1,), 2)
each_call = pytest.mark.parametrize("call", [CALL, FIRST, LINE])


def leaves(call, count=2):
    return [t.requires_grad_() for t in tensors(call.arrays()[:count], "float64")]


# --- Compiled -------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    """Discards compiled programs before and after a test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.long
@each_call
def test_f22_compiled_without_graph_breaks_with_gradients(call, fresh_compiler):
    eager = operation(call, None)
    x, kernel = leaves(call)
    explained = torch._dynamo.explain(eager)(x, kernel)
    assert (explained.graph_break_count, explained.graph_count) == (0, 1)
    nodes = [str(node.target) for node in explained.graphs[0].graph.nodes]
    assert [name for name in nodes if "involution" in name] == ["involution.native.default"]

    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    results = []
    for function in (eager, compiled):
        y = function(x, kernel)
        results.append((y, *torch.autograd.grad(y.pow(2).sum(), (x, kernel))))
    for want, value in zip(*results, strict=True):
        assert torch.equal(want, value)


# PyTorch calls its own deprecated function.
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_f22_compiled_by_the_default_compiler(fresh_compiler):
    def eager(x, kernel):
        return operation(CALL, None)(x.exp(), kernel).sin()

    x, kernel = leaves(CALL)
    results = []
    for function in (eager, torch.compile(eager, fullgraph=True)):
        y = function(x, kernel)
        results.append((y, *torch.autograd.grad(y.sum(), (x, kernel))))
    for want, value in zip(*results, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-12)


# PyTorch's compiler instantiates autograd.Function, which it deprecates.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["native", "taps", "reference"])
def test_f22_inference_is_compiled_without_graph_breaks(name, fresh_compiler):
    eager = operation(CALL, name)
    x, kernel = tensors(CALL.arrays()[:2], "float64")
    y = torch.compile(eager, fullgraph=True, backend="aot_eager")(x, kernel)
    assert_equals_oracle(CALL, y, x, kernel)


@pytest.mark.long
def test_f14_one_program_for_every_batch_size(fresh_compiler):
    counter = CompileCounter()
    program = torch.compile(operation(CALL, None), fullgraph=True, backend=counter, dynamic=True)
    for batch in (8, 4, 6, 10, 11):
        call = dataclasses.replace(CALL, batch=batch)
        x, kernel = tensors(call.arrays()[:2], "float64")
        assert_equals_oracle(call, program(x, kernel), x, kernel)
    assert counter.frame_count == 1


@pytest.mark.long
@pytest.mark.parametrize("padding", ["same", "valid", "symmetric"])
def test_f22_one_program_for_every_image_size(padding, fresh_compiler):
    counter = CompileCounter()
    call = dataclasses.replace(CALL, padding=padding)
    program = torch.compile(operation(call, None), fullgraph=True, backend=counter, dynamic=True)
    # All sizes differ: the compiler specializes to equal ones.
    for sizes in [(16, 21), (14, 27), (12, 23)]:
        sized = dataclasses.replace(call, sizes=sizes)
        x, kernel = tensors(sized.arrays()[:2], "float64")
        assert_equals_oracle(sized, program(x, kernel), x, kernel)
    assert counter.frame_count == 1


@pytest.mark.long
@each_call
@pytest.mark.parametrize("pass_", params.PASSES)
def test_f22_custom_op_passes_opcheck(pass_, call):
    a, b = ARGUMENTS[pass_](*leaves(call, 3))
    window = Window(**call.arguments)
    encoded = params.encode(pass_, window, call.sizes, a, b)
    outcome = torch.library.opcheck(native_torch.operations.unfused, (a, b, encoded, window.rank))
    assert len(outcome) == 4
    assert set(outcome.values()) == {"SUCCESS"}


def test_f22_export_with_dynamic_batch():
    class Module(torch.nn.Module):
        def forward(self, x, kernel):
            return operation(CALL, None)(x, kernel)

    batch = torch.export.Dim("batch")
    arguments = tuple(tensors(CALL.arrays()[:2], "float64"))
    program = torch.export.export(Module(), arguments, dynamic_shapes=({0: batch}, {0: batch}))
    assert "involution.native" in str(program.graph)
    larger = dataclasses.replace(CALL, batch=5)
    x, kernel = tensors(larger.arrays()[:2], "float64")
    assert_equals_oracle(larger, program.module()(x, kernel), x, kernel)


# The tracer warns that Keras's conditions on shapes become constants.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("strides", [1, 2])
def test_traced_with_the_reference_for_every_batch_size(strides):
    layer = involution.Involution2D(3, strides=strides)
    x, larger = torch.rand(1, 7, 9, 16), torch.rand(3, 7, 9, 16)
    layer(x)
    program = torch.jit.trace(layer, x)
    torch.testing.assert_close(program(larger), layer(larger), rtol=0, atol=1e-5)
    with (
        involution.ops.force_implementation("native"),
        pytest.raises(ValueError, match=r"native: torch\.jit\.trace"),
    ):
        torch.jit.trace(layer, x)


# --- Differentiated -------------------------------------------------------------------------------


@pytest.mark.long
@each_call
def test_f17_first_and_second_order_gradients_equal_finite_differences(call):
    call = dataclasses.replace(call, batch=1)
    operator = operation(call, "native")
    assert torch.autograd.gradcheck(operator, leaves(call), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(operator, leaves(call), check_batched_grad=True)


def test_only_required_gradients_are_computed(monkeypatch):
    ran = []
    execute = library.execute

    def recorded(encoded, *arguments):
        ran.append(encoded[0])
        return execute(encoded, *arguments)

    monkeypatch.setattr(library, "execute", recorded)
    for argument, pass_ in ((0, INPUT_GRAD), (1, KERNEL_GRAD)):
        pair = tensors(CALL.arrays()[:2], "float64")
        pair[argument].requires_grad_()
        operation(CALL, "native")(*pair).sum().backward()
        assert ran == [params.PASSES.index(FORWARD), params.PASSES.index(pass_)]
        ran.clear()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:-1])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_f23_tangents_of_dual_tensors(requires_grad, implementation):
    x, kernel = tensors(CALL.arrays()[:2], "float64")
    x.requires_grad_(requires_grad)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, 2 * x.detach())
        y = torch.autograd.forward_ad.unpack_dual(operation(CALL, implementation)(dual, kernel))
    torch.testing.assert_close(y.tangent, 2 * y.primal, rtol=0, atol=1e-12)


# PyTorch's compiler calls its own deprecated functions.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:-1])
def test_f23_compiled_tangent_equals_that_of_the_reference(implementation, fresh_compiler):
    arguments = tuple(tensors(CALL.arrays()[:2], "float64"))

    def tangent(x, kernel):
        apply = operation(CALL, implementation)
        return torch.func.jvp(apply, (x, kernel), (kernel.mean() * x, kernel))[1]

    program = torch.compile(tangent, fullgraph=True, backend="eager")
    y = operation(CALL, "reference")(*arguments)
    want = (arguments[1].mean() + 1) * y
    torch.testing.assert_close(program(*arguments), want, rtol=0, atol=1e-11)


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:-1])
@pytest.mark.parametrize("changed", [0, 1])
def test_f28_input_changed_before_the_backward_pass_raises(changed, implementation):
    inputs = [t * 1 for t in leaves(CALL)]
    y = operation(CALL, implementation)(*inputs)
    inputs[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_f28_no_result_shares_memory_with_an_input(implementation):
    """Even if the result equals the input: the window has one position and the kernel is 1."""
    call = Call(1, (5,), 4, (1,), (1,), "valid", (1,))
    x = tensors(call.arrays()[:1], "float64")[0].requires_grad_()
    kernel = torch.ones(call.kernel_shape, dtype=x.dtype, requires_grad=True)
    dy = torch.ones_like(x)
    y = operation(call, implementation)(x, kernel)
    results = y, *torch.autograd.grad(y, (x, kernel), dy)
    assert torch.equal(y, x)
    memory = [t.untyped_storage().data_ptr() for t in (x, kernel, dy, *results)]
    assert len(set(memory)) == len(memory)


VIEWS = {
    "channels_last memory": lambda t: (
        t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t
    ),
    "every second": lambda t: torch.stack([t, -t], -1)[..., 0],
    "reversed twice": lambda t: t.mT.contiguous().mT,
    "inside": lambda t: torch.nn.functional.pad(t, (3, 2), value=float("nan"))[..., 3:-2],
    "negative": lambda t: torch.complex(t, -t).conj().imag,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_f10_views(view):
    call = dataclasses.replace(CALL, data_format="channels_first")
    x, kernel = (view(t) for t in tensors(call.arrays()[:2], "float64"))
    assert not x.is_contiguous() or x.is_neg()
    y = operation(call, "native")(x, kernel)
    assert y.is_contiguous()
    assert_equals_oracle(call, y, x.resolve_neg(), kernel.resolve_neg())


def test_f10_arbitrary_strides_of_axes_of_size_one():
    call = Call(1, (1, 5), 4, (1, 3), (1, 1), "same", (1, 1))
    x, kernel = tensors(call.arrays()[:2], "float64")
    strided = torch.as_strided(x, x.shape, (1, 7, 4, 1))
    assert strided.is_contiguous()
    assert_equals_oracle(call, operation(call, "native")(strided, kernel), x, kernel)


@pytest.mark.parametrize("kind", ["expanded", "transposed", "every second", "negative"])
def test_f09_non_contiguous_output_gradient(kind):
    x, kernel, dy = CALL.arrays()
    given = {
        "expanded": lambda: torch.tensor(dy[:1, :1, :1, :1]).expand(dy.shape),
        "transposed": lambda: torch.tensor(dy.transpose().copy()).permute(3, 2, 1, 0),
        "every second": lambda: torch.tensor(np.stack([dy, -dy], -1))[..., 0],
        "negative": lambda: torch.complex(torch.tensor(dy), torch.tensor(dy)).conj().imag,
    }[kind]()
    assert not given.is_contiguous() or given.is_neg()
    pair = leaves(CALL)
    results = torch.autograd.grad(operation(CALL, "native")(*pair), pair, given)
    for value, want in zip(
        results, CALL.gradients(x, kernel, given.numpy(force=True)), strict=True
    ):
        np.testing.assert_allclose(value.numpy(), want, rtol=0, atol=1e-12)


def test_inference_mode():
    x, kernel = tensors(CALL.arrays()[:2], "float64")
    with torch.inference_mode():
        y = operation(CALL, "native")(x, kernel)
        assert y.is_inference()
    assert_equals_oracle(CALL, y, x, kernel)


# --- Devices and threads --------------------------------------------------------------------------


@each_call
@pytest.mark.parametrize("pass_", params.PASSES)
def test_f16_shapes_on_the_meta_device(pass_, call):
    a, b = (t.to("meta") for t in ARGUMENTS[pass_](*tensors(call.arrays(), "float32")))
    window = Window(**call.arguments)
    result = native_torch.call(pass_, window, call.sizes, a, b)
    assert result.device.type == "meta"
    assert result.dtype == torch.float32
    assert tuple(result.shape) == params.result_shape(pass_, window, call.sizes, a, b)


def test_f16_other_device_raises():
    x, _ = tensors(CALL.arrays()[:2], "float32")
    problem = problem_of(Window(**CALL.arguments), x)
    assert problem.device == "cpu"
    assert native.unsupported_reason(problem) is None
    elsewhere = dataclasses.replace(problem, device="cuda")
    assert native.unsupported_reason(elsewhere) == "it runs on CPUs, and the tensors are on cuda"
    with pytest.raises(ValueError, match="native: it runs on CPUs, and the tensors are on cuda"):
        dispatch.select(elsewhere, "native")
    assert dispatch.select(elsewhere).name == "taps"


def test_core_uses_the_thread_count_of_pytorch(monkeypatch):
    thread_counts = []
    execute = library.execute

    def recorded(encoded, batch, threads, *addresses):
        thread_counts.append(threads)
        return execute(encoded, batch, threads, *addresses)

    monkeypatch.setattr(library, "execute", recorded)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = involution.ops.involution(*leaves(CALL), **CALL.arguments)
            y.sum().backward()
    finally:
        torch.set_num_threads(before)
    assert thread_counts == [1] * 3 + [3] * 3


LARGE = Call(2, (34, 35), 128, (3, 3), (1, 1), "same", (1, 1), 2)


def threads_of_a_process():
    """Prints, as JSON, threads that the core adds to PyTorch's, and codes of forked children."""

    def thread_count():
        return len(os.listdir("/proc/self/task"))

    torch.set_num_threads(3)
    torch.ones(10**7).exp().sum()
    before = thread_count()
    x, kernel, dy = (a.astype("float32") for a in LARGE.arrays())
    values = native_core.results(LARGE, x, kernel, dy, threads=3)
    added = thread_count() - before
    library.set_openmp(None)
    by_pool = native_core.results(LARGE, x, kernel, dy, threads=3)
    added_by_pool = thread_count() - before
    library.set_openmp(native_torch._openmp())
    assert all((values[m] == by_pool[m]).all() for m in values)
    exit_codes = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # A child that waits for its parent's threads would wait forever.
            again = native_core.results(LARGE, x, kernel, dy, threads=3)
            os._exit(0 if all((values[m] == again[m]).all() for m in values) else 1)
        exit_codes.append(os.waitpid(child, 0)[1])
    print(json.dumps({"added": added, "by_pool": added_by_pool, "children": exit_codes}))


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_core_runs_on_the_threads_of_pytorch():
    """They spin between ops and would compete with others for CPUs. A forked child has its own."""
    code = "import tests.native.test_torch as t; t.threads_of_a_process()"
    assert json.loads(fresh_process(code)) == {"added": 0, "by_pool": 2, "children": [0, 0, 0]}
