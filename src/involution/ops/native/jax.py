"""The core in JAX: a call of XLA's foreign functions, which stays one node inside ``jax.jit``."""

import ctypes
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from involution.ops import fused_autodiff
from involution.ops.autodiff import KERNEL, differentiable
from involution.ops.native import library as native_library
from involution.ops.native.params import (
    BATCHED,
    fused_numbers,
    fused_shapes,
    numbers,
    result_shape,
    wide_type,
)
from involution.ops.validation import CHANNELS_LAST

TARGET, FUSED_TARGET = "involution", "involution_fused"
# Versions 0.1 to this of XLA's interface agree in what csrc/xla_ffi.h declares.
NEWEST_MINOR = 3


def unsupported_reason(problem) -> str | None:
    if jax.default_backend() != "cpu":
        return f"it runs on CPUs, and JAX's default device is a {jax.default_backend()}"
    return _register()


def deprioritize_reason(problem) -> str | None:
    g = problem.window
    if g.data_format == CHANNELS_LAST and problem.x_shape[g.channel_axis] < 4:
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
    # XLA drops the oldest versions of its interface after a year.
    for minor.value in range(1, NEWEST_MINOR + 1):
        try:
            for target, handler in (
                (TARGET, library.involution_jax),
                (FUSED_TARGET, library.involution_jax_fused),
            ):
                jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
            return None
        except jax.errors.JaxRuntimeError as error:
            reason = f"this JAX does not take its library: {str(error).splitlines()[0]}"
    return reason


def _on_one_device(member, g, x_sizes, a, b):
    result = jax.ShapeDtypeStruct(result_shape(member, g, x_sizes, a, b), a.dtype)
    return jax.ffi.ffi_call(TARGET, result)(a, b, **_attributes(numbers(member, g, x_sizes, a, b)))


def _fused_on_one_device(member, g, x_sizes, *arguments):
    dtype = arguments[0].dtype
    results = [
        jax.ShapeDtypeStruct(*result)
        for result in zip(
            fused_shapes(member, g, x_sizes, arguments), (dtype, wide_type(dtype)), strict=True
        )
    ]
    return tuple(
        jax.ffi.ffi_call(FUSED_TARGET, results)(
            *arguments, **_attributes(fused_numbers(member, g, x_sizes, arguments))
        )
    )


def _attributes(integers):
    return {
        "numbers": np.array(integers, "int64"),
        "threads": np.int32(native_library.processors()),
    }


class _OverBatch:
    """``compute(member, geometry, sizes, *arguments)`` on a sharded batch, which stays where it is:
    every device computes its own part. Of nothing else can a part be computed alone.

    ``batched`` tells of a member which arguments and which results have a batch.
    """

    def __init__(self, compute, batched):
        self.compute, self.batched = compute, batched
        self.call = custom_partitioning(compute, static_argnums=(0, 1, 2))
        self.call.def_partition(
            partition=self.partition,
            infer_sharding_from_operands=self.result_sharding,
            sharding_rule=self.rule,
        )

    def _shardings(self, member, arguments, results):
        # The first argument has a batch in every member.
        given = arguments[0].sharding
        leaves, tree = jax.tree.flatten(results)
        before, after = (
            [_sharding(given, *pair) for pair in zip(tensors, has_batch, strict=True)]
            for tensors, has_batch in zip((arguments, leaves), self.batched(member), strict=True)
        )
        return tuple(before), jax.tree.unflatten(tree, after)

    def result_sharding(self, member, g, x_sizes, mesh, arguments, results):
        return self._shardings(member, arguments, results)[1]

    def partition(self, member, g, x_sizes, mesh, arguments, results):
        before, after = self._shardings(member, arguments, results)
        return mesh, functools.partial(self.compute, member, g, x_sizes), after, before

    def rule(self, member, g, x_sizes, mesh, arguments, results):
        names = (f"axis{n}" for n in itertools.count())
        before, after = (
            [
                ["batch"] * has + list(itertools.islice(names, tensor.rank - has))
                for tensor, has in zip(tensors, has_batch, strict=True)
            ]
            for tensors, has_batch in zip((arguments, results), self.batched(member), strict=True)
        )
        text = " -> ".join(", ".join(map(" ".join, side)) for side in (before, after))
        whole = tuple(name for some in (*before, *after) for name in some if name != "batch")
        return text, {"need_replication_factors": whole}


def _sharding(given, tensor, has_batch):
    first = given.spec[:1] if has_batch else ()
    return NamedSharding(given.mesh, PartitionSpec(*first, *[None] * (tensor.ndim - len(first))))


def _all_batched(member):
    return (True, True), (True,)


def _fused_batched(member):
    return BATCHED[member], (True, member == KERNEL)


TWO_STEPS = _OverBatch(_on_one_device, _all_batched)
FUSED = _OverBatch(_fused_on_one_device, _fused_batched)


def _mapped(compute, batched):
    """The same under ``jax.vmap``: the mapped axis joins the batch."""

    def call(member, g, x_sizes, *arguments):
        of_arguments, of_results = batched(member)

        @jax.custom_batching.custom_vmap
        def run(*arguments):
            return compute(member, g, x_sizes, *arguments)

        @run.def_vmap
        def _(size, mapped, *arguments):
            if any(m and not b for m, b in zip(mapped, of_arguments, strict=True)):
                # Weights of their own: one after the other.
                def one(own):
                    own = iter(own)
                    return run(
                        *(next(own) if m else a for a, m in zip(arguments, mapped, strict=True))
                    )

                results = jax.lax.map(one, [a for a, m in zip(arguments, mapped, strict=True) if m])
                return results, jax.tree.map(lambda _: True, results)
            batch = arguments[0].shape[mapped[0]]
            merged = (
                (a if m else jnp.broadcast_to(a, (size, *a.shape))).reshape(
                    size * batch, *a.shape[m + 1 :]
                )
                if b
                else a
                for a, m, b in zip(arguments, mapped, of_arguments, strict=True)
            )
            results, tree = jax.tree.flatten(run(*merged))
            apart = [
                r.reshape(size, batch, *r.shape[1:]) if b else r
                for r, b in zip(results, of_results, strict=True)
            ]
            return jax.tree.unflatten(tree, apart), jax.tree.unflatten(tree, of_results)

        return run(*arguments)

    return call


call = differentiable(_mapped(TWO_STEPS.call, _all_batched))
call_fused = fused_autodiff.differentiable(_mapped(FUSED.call, _fused_batched), call)
