"""A family of members as PyTorch's custom operations: compiled whole, mapped, with shapes alone.

Whoever computes the members, ``native`` or ``triton``, tells how, and gets the two functions that
``native.py`` asks of a binding.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from involution.ops import fused_autodiff, taps
from involution.ops.autodiff import (
    INPUT,
    KERNEL,
    OUTPUT,
    VJP_RULES,
    beyond_functions,
    differentiable,
)
from involution.ops.native.params import BATCHED, MEMBERS, fused_numbers, numbers, wide_type

NAMES = tuple(MEMBERS)


@dataclasses.dataclass(frozen=True)
class Operations:
    """``call`` and ``call_fused`` are the members of the families in ``gradients.py`` and
    ``fused_gradients.py``; ``plain`` and ``fused`` the operations that PyTorch knows."""

    call: Callable
    call_fused: Callable
    plain: Callable
    fused: Callable


def define(name, run, run_fused, device_types=None) -> Operations:
    """Operations involution::name and involution::name_fused.

    Args:
        name: The implementation's.
        run: ``run(numbers, rank, a, b, result)`` computes a member, told by ``numbers`` as in
            ``csrc/involution.h``, into ``result``.
        run_fused: ``run_fused(numbers, rank, arguments, results)``, the same for a fused member.
        device_types: The devices that it runs on; None for any.
    """
    plain, fused = _plain(name, run, device_types), _fused(name, run_fused, device_types)

    def compute(member, g, x_sizes, a, b):
        return plain(a, b, numbers(member, g, x_sizes, a, b), g.rank)

    def compute_fused(member, g, x_sizes, *arguments):
        return fused(*arguments, fused_numbers(member, g, x_sizes, arguments), g.rank)

    # The gradients of a custom operation are for compiled programs: torch.func refuses them.
    eager = differentiable(compute)
    eager_fused = fused_autodiff.differentiable(compute_fused, eager)

    def call(member, g, x_sizes, a, b):
        if _foreign():
            return taps.call(member, g, x_sizes, a, b)
        if torch.compiler.is_compiling():
            return compute(member, g, x_sizes, a, b)
        return eager(member, g, x_sizes, a, b)

    def call_fused(member, g, x_sizes, *arguments):
        if _foreign():
            return fused_autodiff.plain(taps.call, member, g, x_sizes, *arguments)
        if torch.compiler.is_compiling():
            return compute_fused(member, g, x_sizes, *arguments)
        return eager_fused(member, g, x_sizes, *arguments)

    return Operations(call, call_fused, plain, fused)


def _foreign() -> bool:
    """Whether PyTorch would find no derivative of an operation, or in silence one of zero:
    ``taps`` is what it can differentiate then."""
    if torch.compiler.is_compiling():
        try:
            from torch._C._functorch import get_dynamic_layer_stack_depth
        except ImportError:
            return False  # not public
        return get_dynamic_layer_stack_depth() > 0
    return beyond_functions()


def _result(a, numbers, rank) -> torch.Tensor:
    """Room for a member's result, from the numbers alone: in the operation there is no geometry."""
    member, channels_first = NAMES[numbers[0]], numbers[2]
    channels = [numbers[4]]
    if member == KERNEL:
        channels = [numbers[12] * numbers[13] * numbers[14], numbers[5]]
    first = (6 if member == INPUT else 9) + 3 - rank
    spatial = list(numbers[first : first + rank])
    return a.new_empty(
        [a.shape[0], *(channels + spatial if channels_first else spatial + channels)]
    )


def _plain(name, run, device_types):
    @torch.library.custom_op(f"involution::{name}", mutates_args=(), device_types=device_types)
    def operation(
        a: torch.Tensor, b: torch.Tensor, numbers: Sequence[int], rank: int
    ) -> torch.Tensor:
        result = _result(a, numbers, rank)
        run(numbers, rank, a, b, result)
        return result

    @operation.register_fake
    def _(a, b, numbers, rank):
        return _result(a, numbers, rank)

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
                VJP_RULES[NAMES[ctx.numbers[0]]], ctx.needs_input_grad[:2], strict=True
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

    return operation


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


def _fused(name, run, device_types):
    @torch.library.custom_op(
        f"involution::{name}_fused", mutates_args=(), device_types=device_types
    )
    def operation(
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        d: torch.Tensor,
        numbers: Sequence[int],
        rank: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        results = _fused_results(a, numbers, rank)
        run(numbers, rank, (a, b, c, d), results)
        return results

    @operation.register_fake
    def _(a, b, c, d, numbers, rank):
        return _fused_results(a, numbers, rank)

    def setup_context(ctx, inputs, output):
        *arguments, ctx.numbers, ctx.rank = inputs
        ctx.save_for_backward(*arguments)

    def backward(ctx, *cotangents):
        if NAMES[ctx.numbers[0]] != OUTPUT:
            raise NotImplementedError(
                '`fused` has no second derivatives in compiled programs: use("native") has'
            )

        def member(member, g, sizes, *arguments):
            return operation(*arguments, [MEMBERS[member], *ctx.numbers[1:]], ctx.rank)

        gradients = fused_autodiff.output_gradients(
            member, None, None, ctx.saved_tensors, cotangents[0]
        )
        return *gradients, None, None

    operation.register_autograd(backward, setup_context=setup_context)

    @operation.register_vmap
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
                operation(
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
        first, second = operation(*merged, numbers, rank)
        if NAMES[numbers[0]] == KERNEL:
            return (first.unflatten(0, (size, -1)), second.unflatten(0, (size, -1))), (0, 0)
        return (first.unflatten(0, (size, -1)), second), (0, None)

    return operation
