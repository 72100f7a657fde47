"""The core in PyTorch: a custom operation, with its gradients, shapes and vmap."""

import ctypes
import os
import pathlib
from collections.abc import Sequence

import torch

from involution.ops import fused_gradients, native_library
from involution.ops.gradients import INPUT, KERNEL, OUTPUT, RULES, differentiable
from involution.ops.native_call import BATCHED, MEMBERS, fused_numbers, numbers, wide_type

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
    _forbid_tangents(a, b)
    return eager(member, g, x_sizes, a, b)


def call_fused(member, g, x_sizes, *arguments):
    if torch.compiler.is_compiling():
        return compute_fused(member, g, x_sizes, *arguments)
    _forbid_tangents(*arguments)
    return eager_fused(member, g, x_sizes, *arguments)


def _forbid_tangents(*tensors):
    # PyTorch would drop them in silence.
    if any(torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            "`native` has no forward-mode derivatives, only reverse-mode ones"
        )


def compute(member, g, x_sizes, a, b):
    return operation(a, b, numbers(member, g, x_sizes, a, b), g.rank)


def compute_fused(member, g, x_sizes, *arguments):
    return fused_operation(*arguments, fused_numbers(member, g, x_sizes, arguments), g.rank)


# The gradients of a custom operation are for compiled programs: torch.func refuses them.
eager = differentiable(compute)
eager_fused = fused_gradients.differentiable(compute_fused, eager)


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


def _fused_results(a, numbers, rank) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for both results of a fused member."""
    member, hidden = NAMES[numbers[0]], numbers[-1]
    taps_and_groups = numbers[12] * numbers[13] * numbers[14] * numbers[5]
    weights = [a.shape[0], hidden + 1, taps_and_groups] if member == KERNEL else [0]
    channels = hidden if member == KERNEL else numbers[4]
    first = (6 if member == INPUT else 9) + 3 - rank
    shape = [a.shape[0], *numbers[first : first + rank], channels]
    wide = getattr(torch, wide_type(a.dtype))
    return a.new_empty(shape), a.new_empty(weights, dtype=wide)


@torch.library.custom_op("involution::native_fused", mutates_args=(), device_types="cpu")
def fused_operation(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    numbers: Sequence[int],
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = [tensor.contiguous() for tensor in (a, b, c, d)]
    results = _fused_results(a, numbers, rank)
    native_library.run_fused(
        numbers,
        a.shape[0],
        torch.get_num_threads(),
        *(tensor.data_ptr() for tensor in (*arguments, *results)),
    )
    return results


@fused_operation.register_fake
def _(a, b, c, d, numbers, rank):
    return _fused_results(a, numbers, rank)


def setup_fused_context(ctx, inputs, output):
    *arguments, ctx.numbers, ctx.rank = inputs
    ctx.save_for_backward(*arguments)


def fused_backward(ctx, *cotangents):
    if NAMES[ctx.numbers[0]] != OUTPUT:
        raise NotImplementedError(
            '`fused` has no second derivatives in compiled programs: use("native") has'
        )

    def member(name, g, sizes, *arguments):
        return fused_operation(*arguments, [MEMBERS[name], *ctx.numbers[1:]], ctx.rank)

    gradients = fused_gradients.output_gradients(
        member, None, None, ctx.saved_tensors, cotangents[0]
    )
    return *gradients, None, None


fused_operation.register_autograd(fused_backward, setup_context=setup_fused_context)


@fused_operation.register_vmap
def _(info, in_dims, a, b, c, d, numbers, rank):
    size, arguments = info.batch_size, (a, b, c, d)
    batched = BATCHED[NAMES[numbers[0]]]
    tensors = [
        tensor if axis is None else tensor.movedim(axis, 0)
        for tensor, axis in zip(arguments, in_dims, strict=False)
    ]
    mapped = [axis is not None for axis in in_dims[: len(arguments)]]
    if any(m and not b for m, b in zip(mapped, batched, strict=True)):
        # Weights of their own: one after the other.
        each = [
            fused_operation(
                *(t[n] if m else t for t, m in zip(tensors, mapped, strict=True)), numbers, rank
            )
            for n in range(size)
        ]
        return tuple(torch.stack(results) for results in zip(*each, strict=True)), (0, 0)
    # The mapped axis joins the batch.
    merged = [
        (t if m else t.unsqueeze(0).expand(size, *t.shape)).flatten(0, 1) if b else t
        for t, m, b in zip(tensors, mapped, batched, strict=True)
    ]
    first, second = fused_operation(*merged, numbers, rank)
    if NAMES[numbers[0]] == KERNEL:
        return (first.unflatten(0, (size, -1)), second.unflatten(0, (size, -1))), (0, 0)
    return (first.unflatten(0, (size, -1)), second), (0, None)
