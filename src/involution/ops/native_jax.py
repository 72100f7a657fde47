"""The core in JAX: a call of XLA's foreign functions, which stays one node inside ``jax.jit``."""

import ctypes
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from involution.ops import native_library
from involution.ops.geometry import CHANNELS_LAST
from involution.ops.gradients import differentiable
from involution.ops.native_call import numbers, result_shape

TARGET = "involution"


def refusal(problem) -> str | None:
    if jax.default_backend() != "cpu":
        return f"it runs on CPUs, and JAX's default device is a {jax.default_backend()}"
    return _register()


def reluctance(problem) -> str | None:
    g = problem.geometry
    if g.data_format == CHANNELS_LAST and problem.x_shape[g.channel_axis] < 4:
        return "XLA compiles `taps` to faster code for fewer than 4 channels"
    return None


@functools.cache
def _register() -> str | None:
    file = native_library.find("libinvolution_jax.so")
    if file is None:
        return "it was built without the headers of jaxlib"
    handler = ctypes.CDLL(str(file)).involution_jax
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler), platform="cpu")
    return None


def _on_one_device(member, g, x_sizes, a, b):
    result = jax.ShapeDtypeStruct(result_shape(member, g, x_sizes, a, b), a.dtype)
    return jax.ffi.ffi_call(TARGET, result)(
        a,
        b,
        numbers=np.array(numbers(member, g, x_sizes, a, b), "int64"),
        threads=np.int32(native_library.processors()),
    )


# A sharded batch stays where it is: every device computes its own part. Of nothing else can a part
# be computed alone.
_partitioned = custom_partitioning(_on_one_device, static_argnums=(0, 1, 2))


def _over_batch(sharding, ndim):
    first = sharding.spec[0] if len(sharding.spec) else None
    return NamedSharding(sharding.mesh, PartitionSpec(first, *[None] * (ndim - 1)))


def _result_sharding(member, g, x_sizes, mesh, arguments, result):
    return _over_batch(arguments[0].sharding, result.ndim)


def _partition(member, g, x_sizes, mesh, arguments, result):
    shardings = [_over_batch(result.sharding, a.ndim) for a in (*arguments, result)]
    part = functools.partial(_on_one_device, member, g, x_sizes)
    return mesh, part, shardings[-1], tuple(shardings[:-1])


def _sharding_rule(member, g, x_sizes, mesh, arguments, results):
    names = (f"axis{n}" for n in itertools.count())
    *before, after = (
        ["batch", *itertools.islice(names, t.rank - 1)] for t in (*arguments, *results)
    )
    rule = f"{', '.join(map(' '.join, before))} -> {' '.join(after)}"
    whole = tuple(name for some in (*before, after) for name in some[1:])
    return rule, {"need_replication_factors": whole}


_partitioned.def_partition(
    partition=_partition,
    infer_sharding_from_operands=_result_sharding,
    sharding_rule=_sharding_rule,
)


def _compute(member, g, x_sizes, a, b):
    @jax.custom_batching.custom_vmap
    def run(a, b):
        return _partitioned(member, g, x_sizes, a, b)

    @run.def_vmap
    def _(size, mapped, a, b):
        # The mapped axis joins the batch.
        a, b = (
            t if is_mapped else jnp.broadcast_to(t, (size, *t.shape))
            for t, is_mapped in zip((a, b), mapped, strict=True)
        )
        batch = a.shape[1]
        y = run(*(t.reshape(size * batch, *t.shape[2:]) for t in (a, b)))
        return y.reshape(size, batch, *y.shape[1:]), True

    return run(a, b)


call = differentiable(_compute)
