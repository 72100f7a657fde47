"""The passes as PyTorch custom ops: opaque to torch.compile, with gradients, vmap and fake tensors.

``native`` and ``triton`` provide the computation and get the functions ``call`` and ``call_fused``
that ``ops/native`` requires of a binding.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from involution.ops.autodiff import FORWARD, KERNEL_GRAD, VJP_RULES
from involution.ops.autodiff import fused as fused_rules
from involution.ops.autodiff.torch import (
    compiled_transform,
    differentiable,
    differentiable_fused,
    nested_forward_mode,
)
from involution.ops.native.params import (
    HAS_BATCH_AXIS,
    Params,
    accumulation_dtype,
    encode,
    encode_fused,
    with_pass,
)
from involution.ops.taps.torch import call as taps_call


@dataclasses.dataclass(frozen=True)
class Operations:
    """``call`` and ``call_fused`` compute the passes of ``autodiff`` and ``autodiff.fused``;
    ``unfused`` and ``fused`` are the registered PyTorch ops."""

    call: Callable
    call_fused: Callable
    unfused: Callable
    fused: Callable


def register_ops(name, execute, execute_fused, device_types=None) -> Operations:
    """Registers the ops involution::name and involution::name_fused.

    Args:
        name: Name of the implementation.
        execute: ``execute(params, rank, a, b, result)`` computes a pass into ``result``; ``params``
            are encoded ``Params``.
        execute_fused: ``execute_fused(params, rank, arguments, results)``, the same for a fused
            pass.
        device_types: Supported device types; None for all.
    """
    unfused = _unfused_op(name, execute, device_types)
    fused = _fused_op(name, execute_fused, device_types)

    def compute(pass_, window, x_sizes, a, b):
        return unfused(a, b, encode(pass_, window, x_sizes, a, b), window.rank)

    def compute_fused(pass_, window, x_sizes, *arguments):
        return fused(*arguments, encode_fused(pass_, window, x_sizes, arguments), window.rank)

    # Compiled programs use the gradients registered with the op; torch.func does not support them.
    eager = differentiable(compute)
    eager_fused = differentiable_fused(compute_fused, eager)

    def call(pass_, window, x_sizes, a, b):
        if _requires_composite():
            return taps_call(pass_, window, x_sizes, a, b)
        if torch.compiler.is_compiling():
            return compute(pass_, window, x_sizes, a, b)
        return eager(pass_, window, x_sizes, a, b)

    def call_fused(pass_, window, x_sizes, *arguments):
        if _requires_composite():
            return fused_rules.unfused(taps_call, pass_, window, x_sizes, *arguments)
        if torch.compiler.is_compiling():
            return compute_fused(pass_, window, x_sizes, *arguments)
        return eager_fused(pass_, window, x_sizes, *arguments)

    return Operations(call, call_fused, unfused, fused)


def _requires_composite() -> bool:
    """Whether PyTorch would raise an error for the derivative of a custom op, or silently treat it
    as zero. ``taps``, a composition of PyTorch's own ops, is differentiated correctly."""
    return compiled_transform() or nested_forward_mode()


def _empty_result(a, params, rank) -> torch.Tensor:
    """An uninitialized result; its shape depends on ``params`` only."""
    p = Params.decode(params)
    channels = [p.taps, p.groups] if p.pass_name == KERNEL_GRAD else [p.channels]
    spatial = list(p.result_size[3 - rank :])
    return a.new_empty(
        [a.shape[0], *(channels + spatial if p.channels_first else spatial + channels)]
    )


def _unfused_op(name, execute, device_types):
    @torch.library.custom_op(f"involution::{name}", mutates_args=(), device_types=device_types)
    def operation(
        a: torch.Tensor, b: torch.Tensor, params: Sequence[int], rank: int
    ) -> torch.Tensor:
        result = _empty_result(a, params, rank)
        execute(params, rank, a, b, result)
        return result

    @operation.register_fake
    def _(a, b, params, rank):
        return _empty_result(a, params, rank)

    def setup_context(ctx, inputs, output):
        a, b, ctx.params, ctx.rank = inputs
        ctx.save_for_backward(a, b)

    def backward(ctx, c):
        operands = (*ctx.saved_tensors, c)
        gradients = [
            operation(*(operands[i] for i in indices), with_pass(ctx.params, pass_), ctx.rank)
            if needs_grad
            else None
            for (pass_, indices), needs_grad in zip(
                VJP_RULES[Params.decode(ctx.params).pass_name],
                ctx.needs_input_grad[:2],
                strict=True,
            )
        ]
        return (*gradients, None, None)

    operation.register_autograd(backward, setup_context=setup_context)

    @operation.register_vmap
    def _(info, in_dims, a, b, params, rank):
        # Merges the mapped axis into the batch.
        def merged(tensor, axis):
            if axis is None:
                tensor = tensor.unsqueeze(0).expand(info.batch_size, *tensor.shape)
            else:
                tensor = tensor.movedim(axis, 0)
            return tensor.flatten(0, 1)

        result = operation(merged(a, in_dims[0]), merged(b, in_dims[1]), params, rank)
        return result.unflatten(0, (info.batch_size, -1)), 0

    return operation


def _empty_fused_results(a, params, rank) -> tuple[torch.Tensor, torch.Tensor]:
    """Both results of a fused pass, uninitialized."""
    p = Params.decode(params)
    is_kernel_grad = p.pass_name == KERNEL_GRAD
    channels = p.hidden_channels if is_kernel_grad else p.channels
    dweights = [a.shape[0], p.hidden_channels + 1, p.taps * p.groups] if is_kernel_grad else [0]
    dtype = getattr(torch, accumulation_dtype(a.dtype))
    return (
        a.new_empty([a.shape[0], *p.result_size[3 - rank :], channels]),
        a.new_empty(dweights, dtype=dtype),
    )


def _fused_op(name, execute, device_types):
    @torch.library.custom_op(
        f"involution::{name}_fused", mutates_args=(), device_types=device_types
    )
    def operation(
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        d: torch.Tensor,
        params: Sequence[int],
        rank: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        results = _empty_fused_results(a, params, rank)
        execute(params, rank, (a, b, c, d), results)
        return results

    @operation.register_fake
    def _(a, b, c, d, params, rank):
        return _empty_fused_results(a, params, rank)

    def setup_context(ctx, inputs, output):
        *arguments, ctx.params, ctx.rank = inputs
        ctx.save_for_backward(*arguments)

    def backward(ctx, *cotangents):
        if Params.decode(ctx.params).pass_name != FORWARD:
            raise NotImplementedError(
                "`fused` does not support second derivatives under torch.compile; "
                'involution.ops.force_implementation(("triton", "native")) does'
            )

        def call(pass_, window, sizes, *arguments):
            return operation(*arguments, with_pass(ctx.params, pass_), ctx.rank)

        gradients = fused_rules.output_gradients(call, None, None, ctx.saved_tensors, cotangents[0])
        return *gradients, None, None

    operation.register_autograd(backward, setup_context=setup_context)

    @operation.register_vmap
    def _(info, in_dims, a, b, c, d, params, rank):
        size, arguments = info.batch_size, (a, b, c, d)
        pass_name = Params.decode(params).pass_name
        has_batch_axis = HAS_BATCH_AXIS[pass_name]
        tensors = [
            tensor if axis is None else tensor.movedim(axis, 0)
            for tensor, axis in zip(arguments, in_dims, strict=False)
        ]
        mapped = [axis is not None for axis in in_dims[: len(arguments)]]
        if any(m and not b for m, b in zip(mapped, has_batch_axis, strict=True)):
            # A pass has one weight for the whole batch: a mapped weight needs a loop.
            each = [
                operation(
                    *(t[n] if m else t for t, m in zip(tensors, mapped, strict=True)), params, rank
                )
                for n in range(size)
            ]
            return tuple(torch.stack(results) for results in zip(*each, strict=True)), (0, 0)
        # Merges the mapped axis into the batch.
        merged = [
            (t if m else t.unsqueeze(0).expand(size, *t.shape)).flatten(0, 1) if b else t
            for t, m, b in zip(tensors, mapped, has_batch_axis, strict=True)
        ]
        result, dweights = operation(*merged, params, rank)
        if pass_name == KERNEL_GRAD:
            return (result.unflatten(0, (size, -1)), dweights.unflatten(0, (size, -1))), (0, 0)
        return (result.unflatten(0, (size, -1)), dweights), (0, None)

    return operation
