"""The core in PyTorch: a custom operation, with its gradients, shapes and vmap."""

import ctypes
import os
import pathlib
from collections.abc import Sequence

import torch

from involution.ops import native_library
from involution.ops.gradients import INPUT, KERNEL, RULES, differentiable
from involution.ops.native_call import MEMBERS, numbers

NAMES = tuple(MEMBERS)


def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library whose threads PyTorch works in, if it can be told which one that is."""
    if torch.backends.openmp.is_available() and hasattr(os, "RTLD_NOLOAD"):
        own = (pathlib.Path(torch.__file__).parent / "lib").glob("libgomp*")
        for name in (*own, "libgomp.so.1"):
            try:
                return ctypes.CDLL(str(name), mode=os.RTLD_NOLOAD)
            except OSError:
                continue
    return None


# They go on looking for work for a while after an operation: others would wait for a processor.
native_library.use_team(_openmp())


def refusal(problem) -> str | None:
    if problem.device not in (None, "cpu", "meta"):
        return f"it runs on CPUs, and the tensors are on {problem.device}"
    return None


def call(member, g, x_sizes, a, b):
    if torch.compiler.is_compiling():
        return compute(member, g, x_sizes, a, b)
    # PyTorch would drop the tangents in silence.
    if any(torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None for tensor in (a, b)):
        raise NotImplementedError(
            "`native` has no forward-mode derivatives, only reverse-mode ones"
        )
    return eager(member, g, x_sizes, a, b)


def compute(member, g, x_sizes, a, b):
    return operation(a, b, numbers(member, g, x_sizes, a, b), g.rank)


# The gradients of a custom operation are for compiled programs: torch.func refuses them.
eager = differentiable(compute)


def _result_shape(a, numbers, rank) -> list[int]:
    """From the numbers alone: inside the operation there is no geometry."""
    member, channels_first = NAMES[numbers[0]], numbers[2]
    channels = [numbers[4]]
    if member == KERNEL:
        channels = [numbers[12] * numbers[13] * numbers[14], numbers[5]]
    first = (6 if member == INPUT else 9) + 3 - rank
    spatial = list(numbers[first : first + rank])
    return [a.shape[0], *(channels + spatial if channels_first else spatial + channels)]


@torch.library.custom_op("involution::native", mutates_args=(), device_types="cpu")
def operation(a: torch.Tensor, b: torch.Tensor, numbers: Sequence[int], rank: int) -> torch.Tensor:
    a, b = a.contiguous(), b.contiguous()
    result = torch.empty(_result_shape(a, numbers, rank), dtype=a.dtype)
    native_library.run(
        numbers,
        a.shape[0],
        torch.get_num_threads(),
        a.data_ptr(),
        b.data_ptr(),
        result.data_ptr(),
    )
    return result


@operation.register_fake
def _(a, b, numbers, rank):
    return a.new_empty(_result_shape(a, numbers, rank))


def setup_context(ctx, inputs, output):
    a, b, ctx.numbers, ctx.rank = inputs
    ctx.save_for_backward(a, b)


def backward(ctx, c):
    abc = (*ctx.saved_tensors, c)
    gradients = [
        operation(*(abc[i] for i in arguments), [MEMBERS[rule], *ctx.numbers[1:]], ctx.rank)
        if needed
        else None
        for (rule, arguments), needed in zip(
            RULES[NAMES[ctx.numbers[0]]], ctx.needs_input_grad[:2], strict=True
        )
    ]
    return (*gradients, None, None)


operation.register_autograd(backward, setup_context=setup_context)


@operation.register_vmap
def _(info, in_dims, a, b, numbers, rank):
    # The mapped axis joins the batch.
    def merged(tensor, axis):
        if axis is None:
            tensor = tensor.unsqueeze(0).expand(info.batch_size, *tensor.shape)
        else:
            tensor = tensor.movedim(axis, 0)
        return tensor.flatten(0, 1)

    result = operation(merged(a, in_dims[0]), merged(b, in_dims[1]), numbers, rank)
    return result.unflatten(0, (info.batch_size, -1)), 0
