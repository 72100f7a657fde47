"""``native`` on JAX: compiled, mapped, differentiated, exported, and sharded over devices."""

import ctypes
import dataclasses
import json
import pathlib
import shutil
import subprocess
import types as types_of

import jax
import jax.numpy as jnp
import jaxlib
import keras
import numpy as np
import pytest
from jax import export
from jax.test_util import check_grads

import involution
from involution.ops import native
from involution.ops.native import jax as native_jax
from involution.ops.native import library as native_library
from involution.ops.native import params
from involution.ops.problem import problem_of
from involution.ops.window import Window
from tests.support import native_core
from tests.support.backends import (
    IMPLEMENTATIONS,
    assert_equals_oracle,
    fresh_process,
    numpy,
    operation,
    requires_native,
    tensors,
)
from tests.support.native_core import ARGUMENTS
from tests.support.oracle import Call
from tests.support.paths import ROOT, TESTS

pytestmark = requires_native

CALL = Call(2, (5, 7), 12, (3, 2), (2, 1), "same", (1, 2), 3)
FIRST = dataclasses.replace(CALL, data_format="channels_first", group_layout="interleaved")
LINE = Call(2, (7,), 6, (4,), (1,), "symmetric", (1,), 2)
each_call = pytest.mark.parametrize("call", [CALL, FIRST, LINE])


def square(call):
    """A scalar function, nonlinear in both inputs."""
    return lambda x, kernel: (operation(call, "native")(x, kernel) ** 2).sum()


@pytest.mark.long
@each_call
def test_f17_first_and_second_order_gradients_equal_finite_differences(call):
    arguments = tensors(call.arrays()[:2], "float64")
    check_grads(operation(call, "native"), arguments, order=2, modes=["rev"])


def test_program_has_one_custom_call_for_each_pass():
    arguments = tensors(CALL.arrays()[:2], "float64")
    forward = jax.jit(operation(CALL, "native")).lower(*arguments).as_text()
    assert forward.count("custom_call @involution(") == 1
    both = jax.jit(jax.grad(square(CALL), (0, 1))).lower(*arguments).as_text()
    assert both.count("custom_call @involution(") == 3


def test_f14_one_compilation_for_each_shape():
    program = jax.jit(operation(CALL, "native"))
    for seed in range(3):
        x, kernel = tensors(CALL.arrays(seed)[:2], "float64")
        assert_equals_oracle(CALL, program(x, kernel), x, kernel)
    assert program._cache_size() == 1


@pytest.mark.long
def test_f14_one_exported_program_for_every_batch_size():
    (batch,) = export.symbolic_shape("batch")
    shapes = [
        jax.ShapeDtypeStruct((batch, *shape[1:]), "float64")
        for shape in (CALL.x_shape, CALL.kernel_shape)
    ]
    allowed = [export.DisabledSafetyCheck.custom_call(native_jax.TARGET)]
    program = export.export(jax.jit(operation(CALL, "native")), disabled_checks=allowed)(*shapes)
    for n in (1, 2, 5):
        call = dataclasses.replace(CALL, batch=n)
        x, kernel = tensors(call.arrays()[:2], "float64")
        assert_equals_oracle(call, program.call(x, kernel), x, kernel)


def test_export_requires_the_reference():
    arguments = tensors(CALL.arrays()[:2], "float64")
    with pytest.raises(ValueError, match="custom_call @involution"):
        export.export(jax.jit(operation(CALL, None)))(*arguments)
    with involution.ops.force_implementation("reference"):
        program = export.export(jax.jit(operation(CALL, None)))(*arguments)
    stored = export.deserialize(program.serialize())
    assert_equals_oracle(CALL, stored.call(*arguments), *arguments)


@pytest.mark.long
def test_f23_nested_vmap_of_the_gradient():
    x, kernel, _ = CALL.arrays()
    xs = jnp.stack([x, -x, 2 * x])
    kernels = jnp.stack([kernel, 3 * kernel])
    mapped = jax.vmap(jax.vmap(jax.grad(square(CALL), (0, 1)), (0, None)), (None, 0))
    dx, dkernel = jax.jit(mapped)(xs, kernels)
    assert (dx.shape, dkernel.shape) == ((2, 3, *x.shape), (2, 3, *kernel.shape))
    for i, k in enumerate((kernel, 3 * kernel)):
        for j, scaled in enumerate((x, -x, 2 * x)):
            wanted = CALL.gradients(scaled, k, 2 * CALL.involution(scaled, k)[0])
            for value, want in zip((dx[i, j], dkernel[i, j]), wanted, strict=True):
                np.testing.assert_allclose(value, want, rtol=1e-11, atol=1e-10)


def test_f23_vmap_with_an_empty_batch():
    shapes = [(3, 0, *a.shape[1:]) for a in CALL.arrays()[:2]]
    y = jax.vmap(operation(CALL, "native"))(*map(jnp.zeros, shapes))
    assert y.shape == (3, 0, *CALL.output_shape[1:])


def test_f23_forward_mode_raises():
    x, kernel = tensors(CALL.arrays()[:2], "float64")
    with pytest.raises(TypeError, match=r"forward-mode .* custom_vjp"):
        jax.jvp(operation(CALL, "native"), (x, kernel), (x, kernel))


@pytest.mark.long
def test_scan_with_checkpoint():
    """As in the training of deep models: activations are recomputed for the gradient."""
    call = dataclasses.replace(CALL, strides=(1, 1))
    x, kernel, _ = call.arrays()
    kernels = jnp.stack([kernel, -kernel, kernel]) / 4

    def deep(apply):
        layer = jax.checkpoint(lambda x, kernel: (apply(x, kernel), None))
        return jax.grad(lambda x, kernels: (jax.lax.scan(layer, x, kernels)[0] ** 2).sum(), (0, 1))

    values = jax.jit(deep(operation(call, "native")))(x, kernels)
    wanted = jax.jit(deep(operation(call, "reference")))(x, kernels)
    for value, want in zip(values, wanted, strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-10, atol=1e-10)


def test_f28_donated_input():
    """XLA may reuse the memory of a donated x for y, which has the same shape."""
    call = Call(1, (400,), 8, (3,), (1,), "same", (1,), 2)
    x, kernel, _ = call.arrays()
    donated = jnp.array(x)
    y = jax.jit(operation(call, "native"), donate_argnums=0)(donated, jnp.array(kernel))
    assert donated.is_deleted()
    assert_equals_oracle(call, y, jnp.array(x), jnp.array(kernel))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:-1])
@pytest.mark.parametrize("donated", [0, 1])
def test_f28_input_donated_before_the_backward_pass_raises(donated, implementation):
    inputs = tensors(CALL.arrays()[:2], "float64")
    y, pullback = jax.vjp(operation(CALL, implementation), *inputs)
    jax.jit(lambda t: t + 1, donate_argnums=0)(inputs[donated])
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        pullback(y)


def sharded():
    """Prints, as JSON, how two devices compute a sharded batch."""
    devices = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    over_batch = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("batch"))
    call = dataclasses.replace(CALL, batch=4)
    x, kernel, _ = call.arrays()
    programs = {
        "output": (operation(call, "native"), over_batch),
        "gradients": (jax.grad(square(call), (0, 1)), (over_batch, over_batch)),
    }
    result = {"devices": len(jax.devices())}
    for name, (function, results) in programs.items():
        program = jax.jit(function, in_shardings=(over_batch,) * 2, out_shardings=results)
        arguments = [jax.device_put(a, over_batch) for a in (x, kernel)]
        text = program.lower(*arguments).compile().as_text()
        values = jax.tree.leaves(program(*arguments))
        unsharded = jax.tree.leaves(jax.jit(function)(jnp.array(x), jnp.array(kernel)))
        result[name] = {
            "native": text.count('custom_call_target="involution"'),
            "collectives": sum(
                text.count(word) for word in ("all-gather", "all-reduce", "all-to-all")
            ),
            "shard_sizes": [v.addressable_shards[0].data.shape[0] for v in values],
            "equal": [
                bool((numpy(v) == numpy(a)).all()) for v, a in zip(values, unsharded, strict=True)
            ],
        }
    print(json.dumps(result))


@pytest.mark.long
def test_sharded_batch_needs_no_collectives(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    result = json.loads(fresh_process("import tests.native.test_jax as t; t.sharded()"))
    assert result["devices"] == 2
    assert result["output"] == {"native": 1, "collectives": 0, "shard_sizes": [2], "equal": [True]}
    assert result["gradients"] == {
        "native": 3,
        "collectives": 0,
        "shard_sizes": [2, 2],
        "equal": [True, True],
    }


@pytest.mark.parametrize("pass_", params.PASSES)
def test_only_the_batch_axis_is_partitioned(pass_):
    """The rules for both of XLA's partitioners; ``sharded`` runs them."""
    a, b = ARGUMENTS[pass_](*CALL.arrays())
    c = native_core.execute(pass_, CALL, a, b)
    assert native_jax._register() is None
    static = pass_, Window(**CALL.arguments), CALL.sizes
    types = [types_of.SimpleNamespace(rank=t.ndim) for t in (a, b, c)]
    rule, options = native_jax.UNFUSED.sharding_rule(*static, None, types[:2], types[2:])
    factors = [part.split() for part in rule.replace("->", ",").split(",")]
    assert [len(axes) for axes in factors] == [t.ndim for t in (a, b, c)]
    assert {axes[0] for axes in factors} == {"batch"}
    others = [name for axes in factors for name in axes[1:]]
    assert len(set(others)) == len(others)
    assert options == {"need_replication_factors": tuple(others)}

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("devices",))
    spec = jax.sharding.PartitionSpec
    over_two = jax.sharding.NamedSharding(mesh, spec("devices", None))
    shapes = [jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=over_two) for t in (a, b, c)]
    wanted = [spec("devices", *[None] * (t.ndim - 1)) for t in (a, b, c)]
    of_result = native_jax.UNFUSED.result_sharding(*static, mesh, shapes[:2], shapes[2])
    assert of_result.spec == wanted[2]
    _, part, result, arguments = native_jax.UNFUSED.partition(*static, mesh, shapes[:2], shapes[2])
    assert [s.spec for s in (*arguments, result)] == wanted
    np.testing.assert_allclose(part(*map(jnp.array, (a, b))), c, rtol=0, atol=1e-12)


def test_f16_other_default_device_raises(monkeypatch):
    x, kernel = tensors(CALL.arrays()[:2], "float32")
    problem = problem_of(Window(**CALL.arguments), x)
    assert native.unsupported_reason(problem) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    reason = "it runs on CPUs, and JAX's default device is a gpu"
    assert native.unsupported_reason(problem) == reason
    with pytest.raises(ValueError, match=f"native: {reason}"):
        operation(CALL, "native")(x, kernel)
    assert_equals_oracle(CALL, operation(CALL, None)(x, kernel), x, kernel)


def test_core_without_its_binding_has_a_reason(monkeypatch):
    find = native_library.find
    monkeypatch.setattr(native_library, "find", lambda name: None if "jax" in name else find(name))
    native_jax._register.cache_clear()
    x, kernel = (keras.KerasTensor(a.shape) for a in CALL.arrays()[:2])
    try:
        reasons = dict(involution.ops.implementations(x, kernel, **CALL.arguments))
    finally:
        native_jax._register.cache_clear()
    assert reasons["native"] == (
        "the package was installed without its binding for jax: it was not built"
    )


def test_library_rejected_by_jax_is_a_reason(monkeypatch):
    def refuse(*arguments, **more):
        raise jax.errors.JaxRuntimeError(
            "INVALID_ARGUMENT: the API version (0.3) is incompat\nmore"
        )

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    native_jax._register.cache_clear()
    try:
        reason = native_jax.unsupported_reason(None)
    finally:
        native_jax._register.cache_clear()
    assert reason == (
        "this JAX rejects its library: INVALID_ARGUMENT: the API version (0.3) is incompat"
    )


def test_core_uses_the_available_cpus(monkeypatch):
    monkeypatch.setattr(native_library, "available_cpus", lambda: 3)
    arguments = tensors(CALL.arrays()[:2], "float64")
    text = jax.jit(jax.grad(square(CALL), (0, 1))).lower(*arguments).as_text()
    assert text.count("threads = 3 : i32") == 3


def test_newer_ffi_version_is_registered_if_older_ones_are_rejected(monkeypatch):
    """XLA will drop support for version 0.1 of its FFI."""
    library = ctypes.CDLL(str(native_library.binding("jax")[0]))
    minor = ctypes.c_int32.in_dll(library, "involution_jax_minor")
    registered = []

    def register(target, handler, platform):
        if minor.value < 3:
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: incompatible")
        registered.append((target, minor.value))

    monkeypatch.setattr(jax.ffi, "register_ffi_target", register)
    native_jax._register.cache_clear()
    try:
        assert native_jax._register() is None
    finally:
        native_jax._register.cache_clear()
    assert registered == [(native_jax.TARGET, 3), (native_jax.FUSED_TARGET, 3)]


def test_binding_that_cannot_be_loaded_has_a_reason(monkeypatch, tmp_path):
    file = tmp_path / "libinvolution_jax.so"
    file.write_text("no library")
    monkeypatch.setattr(native_library, "binding", lambda name: (file, None))
    native_jax._register.cache_clear()
    try:
        assert native_jax.unsupported_reason(None).startswith("its library cannot be loaded: ")
    finally:
        native_jax._register.cache_clear()


def test_xla_ffi_declarations_match_jaxlib(tmp_path):
    """Sizes, offsets and values, compared by the compiler."""
    include = pathlib.Path(jaxlib.__file__).parent / "include"
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{include}", f"-I{ROOT / 'csrc'}"]
    result = subprocess.run(
        [*command, TESTS / "native" / "xla_ffi.cpp"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


SIZE = sum(3 if f.type == params.Spatial else 1 for f in dataclasses.fields(params.Params))


@pytest.mark.parametrize(
    "attributes",
    [
        {"params": np.zeros(SIZE - 1, "int64"), "threads": np.int32(1)},
        {"params": np.zeros(SIZE, "int32"), "threads": np.int32(1)},
        {"params": np.zeros(SIZE, "int64"), "threads": np.int64(1)},
        {"params": np.zeros(SIZE, "int64"), "thread": np.int32(1)},
        {"params": np.int64(SIZE), "threads": np.int32(1)},
    ],
)
def test_call_with_parameters_of_another_version_raises(attributes):
    """As from another version of the Python code: the core must not read out of bounds."""
    assert native_jax.unsupported_reason(None) is None
    x = jnp.zeros((1, 2, 2, 4))
    call = jax.ffi.ffi_call(native_jax.TARGET, jax.ShapeDtypeStruct(x.shape, x.dtype))
    with pytest.raises(jax.errors.JaxRuntimeError, match="parameters of another version"):
        jax.block_until_ready(call(x, x, **attributes))


def test_call_with_other_tensors_raises():
    assert native_jax.unsupported_reason(None) is None
    x = jnp.zeros((1, 2, 2, 4))
    attributes = {"params": np.zeros(SIZE, "int64"), "threads": np.int32(1)}
    call = jax.ffi.ffi_call(native_jax.TARGET, jax.ShapeDtypeStruct(x.shape, x.dtype))
    for given in ((x,), (x, x, x), (jnp.float32(0), x)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="arguments of another version"):
            jax.block_until_ready(call(*given, **attributes))


@pytest.mark.long
@pytest.mark.parametrize("implementation", ["taps", "reference"])
def test_exported_programs_have_symbolic_sizes(implementation):
    def apply(x, kernel):
        arguments = {"groups": 2, "implementation": implementation}
        return involution.ops.involution(x, kernel, 3, data_format="channels_last", **arguments)

    batch, height = export.symbolic_shape("b, h")
    shapes = (batch, height, 6, 4), (batch, height, 6, 9, 2)
    specs = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    exported = export.deserialize(export.export(jax.jit(apply))(*specs).serialize())
    for b, h in ((1, 5), (3, 8)):
        x = jax.random.normal(jax.random.key(0), (b, h, 6, 4), "float32")
        kernel = jax.random.normal(jax.random.key(1), (b, h, 6, 9, 2), "float32")
        np.testing.assert_allclose(exported.call(x, kernel), apply(x, kernel), atol=1e-5)
