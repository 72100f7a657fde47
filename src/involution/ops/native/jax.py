"""The core in JAX: an XLA FFI call, which stays one node inside ``jax.jit``."""

import ctypes
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from involution.ops.autodiff import KERNEL_GRAD
from involution.ops.autodiff.jax import differentiable, differentiable_fused
from involution.ops.native import library as native_library
from involution.ops.native.params import (
    HAS_BATCH_AXIS,
    accumulation_dtype,
    encode,
    encode_fused,
    fused_result_shapes,
    result_shape,
)
from involution.ops.validation import CHANNELS_LAST

TARGET, FUSED_TARGET = "involution", "involution_fused"
# csrc/xla_ffi.h matches versions 0.1 to 0.NEWEST_MINOR of XLA's FFI.
NEWEST_MINOR = 3


def unsupported_reason(problem) -> str | None:
    if jax.default_backend() != "cpu":
        return f"it runs on CPUs, and JAX's default device is a {jax.default_backend()}"
    return _register()


def deprioritize_reason(problem) -> str | None:
    window = problem.window
    if window.data_format == CHANNELS_LAST and problem.x_shape[window.channel_axis] < 4:
        return "XLA compiles `taps` to faster code for fewer than 4 channels"
    return None


@functools.cache
def _register() -> str | None:
    file, reason = native_library.binding("jax")
    if file is None:
        return reason
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        return f"its library cannot be loaded: {error}"
    minor = ctypes.c_int32.in_dll(library, "involution_jax_minor")
    # XLA drops support for a version of its FFI after a year.
    for minor.value in range(1, NEWEST_MINOR + 1):
        try:
            for target, handler in (
                (TARGET, library.involution_jax),
                (FUSED_TARGET, library.involution_jax_fused),
            ):
                jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
            return None
        except jax.errors.JaxRuntimeError as error:
            reason = f"this JAX rejects its library: {str(error).splitlines()[0]}"
    return reason


def _single_device(pass_, window, x_sizes, a, b):
    result = jax.ShapeDtypeStruct(result_shape(pass_, window, x_sizes, a, b), a.dtype)
    return jax.ffi.ffi_call(TARGET, result)(
        a, b, **_attributes(encode(pass_, window, x_sizes, a, b))
    )


def _fused_single_device(pass_, window, x_sizes, *arguments):
    dtype = arguments[0].dtype
    results = [
        jax.ShapeDtypeStruct(*result)
        for result in zip(
            fused_result_shapes(pass_, window, x_sizes, arguments),
            (dtype, accumulation_dtype(dtype)),
            strict=True,
        )
    ]
    return tuple(
        jax.ffi.ffi_call(FUSED_TARGET, results)(
            *arguments, **_attributes(encode_fused(pass_, window, x_sizes, arguments))
        )
    )


def _attributes(params):
    return {
        "params": np.array(params, "int64"),
        "threads": np.int32(native_library.available_cpus()),
    }


class _BatchSharded:
    """Partitions ``compute(pass_, window, sizes, *arguments)`` along the batch axis.

    Each device computes its own shard of the batch; all other axes are replicated.
    ``has_batch_axis(pass_)`` returns which arguments and which results have a batch axis.
    """

    def __init__(self, compute, has_batch_axis):
        self.compute, self.has_batch_axis = compute, has_batch_axis
        self.call = custom_partitioning(compute, static_argnums=(0, 1, 2))
        self.call.def_partition(
            partition=self.partition,
            infer_sharding_from_operands=self.result_sharding,
            sharding_rule=self.sharding_rule,
        )

    def _shardings(self, pass_, arguments, results):
        # The first argument of every pass has a batch axis.
        first = arguments[0].sharding
        leaves, tree = jax.tree.flatten(results)
        argument_shardings, result_shardings = (
            [_sharding(first, *pair) for pair in zip(tensors, has_batch, strict=True)]
            for tensors, has_batch in zip(
                (arguments, leaves), self.has_batch_axis(pass_), strict=True
            )
        )
        return tuple(argument_shardings), jax.tree.unflatten(tree, result_shardings)

    def result_sharding(self, pass_, window, x_sizes, mesh, arguments, results):
        return self._shardings(pass_, arguments, results)[1]

    def partition(self, pass_, window, x_sizes, mesh, arguments, results):
        argument_shardings, result_shardings = self._shardings(pass_, arguments, results)
        compute = functools.partial(self.compute, pass_, window, x_sizes)
        return mesh, compute, result_shardings, argument_shardings

    def sharding_rule(self, pass_, window, x_sizes, mesh, arguments, results):
        names = (f"axis{n}" for n in itertools.count())
        sides = [
            [
                ["batch"] * has + list(itertools.islice(names, tensor.rank - has))
                for tensor, has in zip(tensors, has_batch, strict=True)
            ]
            for tensors, has_batch in zip(
                (arguments, results), self.has_batch_axis(pass_), strict=True
            )
        ]
        rule = " -> ".join(", ".join(map(" ".join, side)) for side in sides)
        axes = itertools.chain.from_iterable(itertools.chain(*sides))
        replicated = tuple(name for name in axes if name != "batch")
        return rule, {"need_replication_factors": replicated}


def _sharding(like, tensor, has_batch):
    batch = like.spec[:1] if has_batch else ()
    return NamedSharding(like.mesh, PartitionSpec(*batch, *[None] * (tensor.ndim - len(batch))))


def _batch_axes(pass_):
    return (True, True), (True,)


def _fused_batch_axes(pass_):
    return HAS_BATCH_AXIS[pass_], (True, pass_ == KERNEL_GRAD)


UNFUSED = _BatchSharded(_single_device, _batch_axes)
FUSED = _BatchSharded(_fused_single_device, _fused_batch_axes)


def _with_batching_rule(compute, has_batch_axis):
    """``compute`` with a rule for ``jax.vmap``, which merges the mapped axis into the batch."""

    def call(pass_, window, x_sizes, *arguments):
        argument_has_batch, result_has_batch = has_batch_axis(pass_)

        @jax.custom_batching.custom_vmap
        def run(*arguments):
            return compute(pass_, window, x_sizes, *arguments)

        @run.def_vmap
        def _(size, mapped, *arguments):
            if any(m and not b for m, b in zip(mapped, argument_has_batch, strict=True)):
                # A pass has one weight for the whole batch: a mapped weight needs a loop.
                def run_one(mapped_arguments):
                    values = iter(mapped_arguments)
                    return run(
                        *(next(values) if m else a for a, m in zip(arguments, mapped, strict=True))
                    )

                results = jax.lax.map(
                    run_one, [a for a, m in zip(arguments, mapped, strict=True) if m]
                )
                return results, jax.tree.map(lambda _: True, results)
            batch = arguments[0].shape[mapped[0]]
            merged = (
                (a if m else jnp.broadcast_to(a, (size, *a.shape))).reshape(
                    size * batch, *a.shape[m + 1 :]
                )
                if b
                else a
                for a, m, b in zip(arguments, mapped, argument_has_batch, strict=True)
            )
            results, tree = jax.tree.flatten(run(*merged))
            unstacked = [
                r.reshape(size, batch, *r.shape[1:]) if b else r
                for r, b in zip(results, result_has_batch, strict=True)
            ]
            return jax.tree.unflatten(tree, unstacked), jax.tree.unflatten(tree, result_has_batch)

        return run(*arguments)

    return call


call = differentiable(_with_batching_rule(UNFUSED.call, _batch_axes))
call_fused = differentiable_fused(_with_batching_rule(FUSED.call, _fused_batch_axes), call)
