"""Involution modules in the programs that PyTorch makes of modules: compiled, exported, traced,
quantized."""

import copy
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import involution
from involution.torch import Involution1d, Involution2d, Involution3d, functional

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # the quantization of older PyTorch
    from torch.ao import quantization
    from torch.ao.quantization import quantize_fx

DYNAMIC = torch.export.Dim.DYNAMIC
# The first is that of the example input.
SIZES = [(2, 32, 9, 8), (3, 32, 7, 11), (1, 32, 12, 6)]
VARIANTS = {
    "default": {},
    "strided": {"stride": 2},
    "same": {"stride": 2, "padding": "same", "out_channels": 5},
    "valid": {"padding": "valid", "kernel_softmax": True},
    "interleaved": {"group_layout": "interleaved", "return_kernel": True},
    "contextual": {"kernel_generator": "contextual", "kernel_dropout": 0.5},
    "static": {"kernel_generator": "static", "stride": 2},
    "attention": {"kernel_generator": "pairwise_attention", "stride": 2},
    "cropped": {"kernel_generator": "pairwise_attention", "padding": "valid", "stride": 2},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def mostly_slow(*names):
    """Parameters: the variants of these names, and the others for `make test-long`."""
    return [pytest.param(v, marks=() if v in names else pytest.mark.slow) for v in VARIANTS]


def make(variant="default"):
    return Involution2d(32, 3, **VARIANTS[variant]).eval()


def all_images():
    return [torch.randn(size) for size in SIZES]


def assert_equal(found, expected, rtol=1e-5):
    found, expected = (t if isinstance(t, tuple) else (t,) for t in (found, expected))
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= rtol * b.abs().max()


@pytest.fixture(autouse=True)
def _new_compiler():
    torch.compiler.reset()


# torch.compile


@pytest.mark.long
@pytest.mark.parametrize("variant", mostly_slow("default", "valid"))
def test_compiles_to_one_graph_for_all_sizes(variant):
    module, graphs = make(variant), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for x in all_images()[:2]:  # the compiler always specializes for a batch of one
        assert_equal(compiled(x), module(x))
    assert len(graphs) == 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("variant", "memory_format"),
    [
        ("default", torch.contiguous_format),
        pytest.param("default", torch.channels_last, marks=pytest.mark.slow),
        pytest.param("valid", torch.channels_last, marks=pytest.mark.slow),
        pytest.param("attention", torch.contiguous_format, marks=pytest.mark.slow),
    ],
)
def test_compiled_training_equals_eager(variant, memory_format):
    module = make(variant).train()
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in all_images():
        x = x.contiguous(memory_format=memory_format)
        results = []
        for function, parameters in ((compiled, module), (twin, twin)):
            given = x.clone().requires_grad_()
            y = function(given)
            assert y.is_contiguous(memory_format=memory_format)
            y.square().mean().backward()
            results.append((y.detach(), given.grad, *(p.grad for p in parameters.parameters())))
        assert_equal(*results, rtol=1e-4)
    assert_equal(tuple(module.buffers()), tuple(twin.buffers()))


@pytest.mark.long
def test_compiled_modules_call_the_hooks_of_the_last_convolution():
    module, x = make(), torch.randn(SIZES[0])
    plain = module(x)
    module.conv2.conv.register_forward_hook(lambda _, x, y: 2 * y)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert_equal(compiled(x), 2 * plain)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of PyTorch's norm
@pytest.mark.parametrize("implementation", [None, "taps", "reference"])
def test_compiled_gradients_by_sample(implementation):
    module = Involution2d(8, 3, groups=2, implementation=implementation).eval()
    x = torch.randn(3, 8, 5, 4)

    def gradients(x):
        return torch.func.vmap(torch.func.grad(lambda x: module(x[None]).square().sum()))(x)

    expected = torch.stack([gradients(x[i : i + 1])[0] for i in range(len(x))])
    assert_equal(gradients(x), expected)
    compiled = torch.compile(gradients, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(x), expected)


@pytest.mark.parametrize("implementation", [None, "native", "taps", "reference"])
def test_vectorized_jacobians_and_hessians(implementation):
    module = Involution2d(4, 3, groups=2, reduction_ratio=1, implementation=implementation)
    module = module.double().eval()
    x = torch.randn(1, 4, 3, 2, dtype=torch.float64)
    for derivative, function in (
        (torch.autograd.functional.jacobian, module),
        (torch.autograd.functional.hessian, lambda x: module(x).square().sum()),
    ):
        expected = derivative(function, x)
        assert_equal(derivative(function, x, vectorize=True), expected, rtol=1e-10)


# torch.export and ONNX


def exported(module, x, strict=False):
    sizes = dict.fromkeys((0, *range(2, x.ndim)), DYNAMIC)
    return torch.export.export(module, (x,), dynamic_shapes=(sizes,), strict=strict)


@pytest.mark.long
@pytest.mark.parametrize(
    ("variant", "strict"),
    [
        *(("default", False), ("valid", True), ("attention", False)),
        *(pytest.param(v, s, marks=pytest.mark.slow) for v in VARIANTS for s in (False, True)),
    ],
)
def test_exports_for_all_sizes(variant, strict):
    module = make(variant)
    program = exported(module, torch.randn(SIZES[0]), strict).module()
    for x in all_images():
        assert_equal(program(x), module(x))


@pytest.mark.long
def test_exported_programs_are_saved(tmp_path):
    module, x = make(), torch.randn(SIZES[0])
    torch.export.save(exported(module, x), tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    assert_equal(program(x), module(x))


# From PyTorch's exporter.
onnx_warnings = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated")


def onnx_session(module, x, path):
    sizes = dict.fromkeys((0, *range(2, x.ndim)), DYNAMIC)
    program = torch.onnx.export(module, (x,), dynamo=True, dynamic_shapes=(sizes,), verbose=False)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(x):
        outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        return tuple(torch.tensor(np.asarray(output)) for output in outputs)

    return run


@pytest.mark.long
@onnx_warnings
@pytest.mark.parametrize("variant", mostly_slow("default"))
def test_onnx_equals_pytorch_at_all_sizes(variant, tmp_path):
    module = make(variant)
    run = onnx_session(module, torch.randn(SIZES[0]), tmp_path / "model.onnx")
    for x in all_images():
        y = module(x)
        assert_equal(run(x), y if isinstance(y, tuple) else (y,))


@pytest.mark.slow
@onnx_warnings
@pytest.mark.parametrize("rank", [1, 3])
def test_onnx_equals_pytorch_in_other_dimensions(rank, tmp_path):
    module = {1: Involution1d, 3: Involution3d}[rank](32, 3, stride=2).eval()
    sizes = [(2, 32, *(9, 8, 5)[:rank]), (3, 32, *(6, 7, 4)[:rank])]
    run = onnx_session(module, torch.randn(sizes[0]), tmp_path / "model.onnx")
    for size in sizes:
        x = torch.randn(size)
        assert_equal(run(x), (module(x),))


# torch.fx and TorchScript


@each_variant
def test_symbolic_traces_run_at_all_sizes(variant):
    module = make(variant)
    traced = torch.fx.symbolic_trace(module)
    for x in all_images():
        assert_equal(traced(x), module(x), rtol=0)


def test_symbolic_traces_use_the_current_parameters():
    module, x = make(), torch.randn(SIZES[0])
    traced = torch.fx.symbolic_trace(module)
    with torch.no_grad():
        traced.conv2.conv.weight.zero_()
        traced.conv2.conv.bias.fill_(1)
    ones = torch.ones(2, 2, 9, 9, 8)
    torch.testing.assert_close(traced(x), functional.involution(x, ones, 3))


def test_symbolic_traces_have_the_modules_of_the_generator():
    # As torchvision's feature extraction selects them.
    network = nn.Sequential(nn.Conv2d(3, 32, 1), Involution2d(32, 3)).eval()
    graph = torch.fx.symbolic_trace(network).graph
    names = [node.target for node in graph.nodes if node.op == "call_module"]
    assert names == ["0", "1.pool", "1.conv1.conv", "1.conv1.bn", "1.conv1.relu"]


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace", "ignore:Converting a tensor to a Python:torch.jit.TracerWarning"
)
def test_jit_trace_equals_eager():
    module, x = make("strided"), torch.randn(SIZES[0])
    assert_equal(torch.jit.trace(module, x)(x), module(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_jit_script_is_refused():
    with pytest.raises(NotImplementedError, match=r"use torch\.compile, torch\.export"):
        torch.jit.script(make())


# Quantization

old_quantization = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated",
    "ignore:Please use quant_min and quant_max",
    "ignore:.*quantized tensor creation functions",
)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 32, 1),
        Involution2d(32, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    ).eval()


@old_quantization
def test_dynamic_quantization_leaves_the_involution():
    model, x = network(), torch.randn(2, 3, 9, 8)
    quantized = quantization.quantize_dynamic(model, {nn.Linear})
    assert torch.equal(quantized[1](model[0](x)), model[1](model[0](x)))
    assert type(quantized[4]) is not nn.Linear
    assert_equal(quantized(x), model(x), rtol=0.05)


@old_quantization
def test_quantization_of_traces_is_close():
    model, x = network(), torch.randn(2, 3, 9, 8)
    mapping = quantization.get_default_qconfig_mapping()
    prepared = quantize_fx.prepare_fx(model, mapping, (x,))
    prepared(x)
    assert_equal(quantize_fx.convert_fx(prepared)(x), model(x), rtol=0.3)


@old_quantization
def test_quantized_input_is_refused():
    x = torch.quantize_per_tensor(torch.randn(SIZES[0]), 0.1, 0, torch.quint8)
    with pytest.raises(ValueError, match=r"dequantize it before.*x\.dtype=torch\.quint8$"):
        make()(x)


# Dtypes


@pytest.mark.parametrize("generator", [None, "static", "pairwise_attention"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_than_the_parameters_are_refused(generator, dtype):
    module = Involution2d(32, 3, kernel_generator=generator)
    message = (
        rf"dtype of its parameters, torch\.float32: use x\.to\(torch\.float32\), .*"
        rf"torch\.autocast\. Received: x\.dtype={dtype}$"
    )
    with pytest.raises(ValueError, match=message):
        module(torch.randn(SIZES[0], dtype=dtype))


def test_other_errors_are_unchanged():
    class Generator(nn.Module):
        def forward(self, features):
            raise RuntimeError("of the generator")

    module = Involution2d(32, 3, kernel_generator=Generator())
    with pytest.raises(RuntimeError, match=r"^of the generator$"):
        module(torch.randn(SIZES[0], dtype=torch.float64))


@pytest.mark.parametrize("implementation", ["native", "taps", "reference", ("rows", "taps")])
def test_implementation_is_that_of_the_argument(implementation, executed):
    module = Involution2d(32, 3, implementation=implementation).eval()
    x = torch.randn(SIZES[0])
    found = module(x)
    assert set(executed) == {implementation if isinstance(implementation, str) else "rows"}
    with involution.ops.force_implementation("reference"):
        assert_equal(found, module(x))
    assert executed[-1] == "reference"


def test_fused_is_chosen_where_it_is_faster(executed):
    module = Involution2d(32, 3).eval()
    module(torch.randn(1, 32, 9, 8))
    assert executed == ["fused"]
    module(torch.randn(1, 32, 2, 2))  # fewer positions than hidden channels
    assert "fused" not in executed[1:]
    assert len(executed) == 2
