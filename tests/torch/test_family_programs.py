"""Upsampling, transposed and causal modules in the programs that PyTorch makes of modules."""

import numpy as np
import onnxruntime
import pytest
import torch

from involution.torch import Involution1d, InvolutionTranspose2d, InvolutionUpsample2d

DYNAMIC = torch.export.Dim.DYNAMIC
# A module, and its inputs for given sizes.
FAMILY = {
    "upsample": (
        lambda: InvolutionUpsample2d(8, 2, 3, groups=2),
        lambda b, n, m: [torch.randn(b, 8, n, m)],
    ),
    "guided": (
        lambda: InvolutionUpsample2d(8, (2, 3), 3, guide_channels=4, kernel_softmax="in_bounds"),
        lambda b, n, m: [torch.randn(b, 8, n, m), torch.randn(b, 4, 2 * n, 3 * m)],
    ),
    "transposed": (
        lambda: InvolutionTranspose2d(16, 3, stride=2, output_padding=1),
        lambda b, n, m: [torch.randn(b, 16, n, m)],
    ),
    "transposed, interleaved": (
        lambda: InvolutionTranspose2d(
            16, 3, groups=2, padding="same", stride=2, group_layout="interleaved"
        ),
        lambda b, n, m: [torch.randn(b, 16, n, m)],
    ),
    "causal": (
        lambda: Involution1d(16, 4, padding="causal"),
        lambda b, n, m: [torch.randn(b, 16, n)],
    ),
    "causal attention": (
        lambda: Involution1d(16, 4, padding="causal", kernel_generator="pairwise_attention"),
        lambda b, n, m: [torch.randn(b, 16, n)],
    ),
    "causal, in bounds": (
        lambda: Involution1d(
            16, 3, padding="causal", kernel_softmax="in_bounds", kernel_generator="contextual"
        ),
        lambda b, n, m: [torch.randn(b, 16, n)],
    ),
}
SIZES = [(2, 9, 7), (3, 6, 11), (2, 12, 5)]
each_module = pytest.mark.parametrize("name", FAMILY)


def mostly_slow(*names):
    return [pytest.param(n, marks=() if n in names else pytest.mark.slow) for n in FAMILY]


def make(name):
    return FAMILY[name][0]().eval()


def inputs_of(name, sizes):
    return FAMILY[name][1](*sizes)


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def dynamic_shapes(inputs):
    return tuple(dict.fromkeys((0, *range(2, x.ndim)), DYNAMIC) for x in inputs)


@pytest.fixture(autouse=True)
def _new_compiler():
    torch.compiler.reset()


@pytest.mark.long
@pytest.mark.parametrize("name", mostly_slow("upsample", "transposed", "causal"))
def test_compiles_to_one_graph_for_all_sizes(name):
    module, graphs = make(name), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for sizes in SIZES:
        inputs = inputs_of(name, sizes)
        assert_close(compiled(*inputs), module(*inputs))
    assert len(graphs) == 1


@pytest.mark.long
@pytest.mark.parametrize("name", mostly_slow("guided", "transposed"))
def test_compiled_gradients_equal_eager_ones(name):
    module, inputs = make(name), inputs_of(name, SIZES[0])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    parameters = list(module.parameters())
    expected = torch.autograd.grad(module(*inputs).square().sum(), parameters)
    found = torch.autograd.grad(compiled(*inputs).square().sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", mostly_slow("upsample", "transposed", "causal"))
def test_exports_for_all_sizes(name):
    module, inputs = make(name), inputs_of(name, SIZES[0])
    program = torch.export.export(
        module, tuple(inputs), dynamic_shapes=dynamic_shapes(inputs)
    ).module()
    for sizes in SIZES:
        inputs = inputs_of(name, sizes)
        assert_close(program(*inputs), module(*inputs))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated")
@pytest.mark.parametrize("name", mostly_slow("upsample", "transposed", "causal"))
def test_onnx_equals_pytorch_at_all_sizes(name, tmp_path):
    module, inputs = make(name), inputs_of(name, SIZES[0])
    program = torch.onnx.export(
        module, tuple(inputs), dynamo=True, dynamic_shapes=dynamic_shapes(inputs), verbose=False
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    for sizes in SIZES:
        inputs = inputs_of(name, sizes)
        names = [i.name for i in session.get_inputs()]
        feed = {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
        (y,) = session.run(None, feed)
        assert_close(torch.tensor(np.asarray(y)), module(*inputs))


@each_module
def test_symbolic_traces_run_at_all_sizes(name):
    module = make(name)
    fixed = {} if name == "guided" else {"guide": None} if name == "upsample" else None
    traced = torch.fx.symbolic_trace(module, concrete_args=fixed)
    for sizes in SIZES:
        inputs = inputs_of(name, sizes)
        assert torch.equal(traced(*inputs), module(*inputs))


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace", "ignore:Converting a tensor to a Python:torch.jit.TracerWarning"
)
@each_module
def test_jit_trace_equals_eager(name):
    module, inputs = make(name), inputs_of(name, SIZES[0])
    assert_close(torch.jit.trace(module, tuple(inputs))(*inputs), module(*inputs))
