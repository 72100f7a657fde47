"""The passes with derivatives in PyTorch."""

import functools
from collections.abc import Callable

import torch

from involution.ops.autodiff import FORWARD, PassSpec, fused, gradients, tangent

# The transforms of torch.func around a call; None if there is none.
function_transforms: Callable[[], list | None]
try:
    from torch._C._functorch import get_interpreter_stack
except ImportError:  # private API, which may be missing
    function_transforms = list
else:
    function_transforms = get_interpreter_stack


def differentiable(compute):
    """``compute(pass_, window, sizes, a, b)`` with the derivatives of ``VJP_RULES``.

    ``sizes`` are the spatial sizes of the operator's input, which the other tensors do not
    determine.
    """

    class TracedPass(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(spec, a, b):
            return compute(spec.pass_, spec.window, spec.sizes, a, b)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.spec, a, b = inputs
            ctx.save_for_backward(a, b)
            ctx.save_for_forward(a, b)

        @staticmethod
        def backward(ctx, c):
            spec, needs_grad = ctx.spec, ctx.needs_input_grad[1:]
            operands = (*ctx.saved_tensors, c)
            return None, *gradients(call, spec.pass_, spec.window, spec.sizes, operands, needs_grad)

    class EagerPass(TracedPass):
        @staticmethod
        def jvp(ctx, _, *tangents):
            return tangent(
                functools.partial(EagerPass.apply, ctx.spec), ctx.saved_tensors, tangents
            )

    def call(pass_, window, sizes, a, b):
        if not _is_differentiated(a, b):
            return compute(pass_, window, sizes, a, b)
        # torch.compile supports no autograd.Function with a ``jvp``; it derives one from
        # ``compute``.
        function = TracedPass if torch.compiler.is_compiling() else EagerPass
        return function.apply(PassSpec(pass_, window, sizes), a, b)

    return call


def differentiable_fused(compute, unfused_call):
    """``compute(pass_, window, sizes, *arguments)`` with the derivatives of ``fused``.

    ``unfused_call`` computes the passes with stored kernels: a result of ``differentiable``.
    """
    unfused = functools.partial(fused.unfused, unfused_call)

    class FusedPass(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(spec, *arguments):
            return compute(spec.pass_, spec.window, spec.sizes, *arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.spec, *arguments = inputs
            ctx.save_for_backward(*arguments)
            ctx.save_for_forward(*arguments)

        @staticmethod
        def backward(ctx, *cotangents):
            spec, arguments = ctx.spec, ctx.saved_tensors
            if spec.pass_ == FORWARD:
                return None, *fused.output_gradients(
                    call, spec.window, spec.sizes, arguments, cotangents[0]
                )
            return None, *torch.func.vjp(unfused_pass(spec), *arguments)[1](cotangents)

        @staticmethod
        def jvp(ctx, _, *tangents):
            spec, arguments = ctx.spec, ctx.saved_tensors
            if spec.pass_ == FORWARD:
                call = functools.partial(FusedPass.apply, spec)
                return fused.output_tangent(call, arguments, tangents)
            tangents = tuple(
                torch.zeros_like(a) if t is None else t
                for a, t in zip(arguments, tangents, strict=True)
            )
            return torch.func.jvp(unfused_pass(spec), arguments, tangents)[1]

    def unfused_pass(spec):
        return functools.partial(unfused, spec.pass_, spec.window, spec.sizes)

    def call(pass_, window, sizes, *arguments):
        if not _is_differentiated(*arguments):
            return compute(pass_, window, sizes, *arguments)
        return FusedPass.apply(PassSpec(pass_, window, sizes), *arguments)

    return call


def _is_differentiated(*tensors) -> bool:
    """Whether derivatives of the call may be taken. If not, ``autograd.Function`` is not needed,
    whose call takes as long as a small involution."""
    if torch.compiler.is_compiling():
        return True
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    # Dual numbers and the transforms of torch.func: private API, which may be missing.
    level = getattr(torch.autograd.forward_ad, "_current_level", 0)
    return level >= 0 or function_transforms() is not None


def compiled_transform() -> bool:
    """Whether torch.compile traces a function that torch.func transforms.

    It then supports neither custom ops nor, in ``vmap``, an ``autograd.Function``; compositions of
    PyTorch's own ops it differentiates itself.
    """
    if not torch.compiler.is_compiling():
        return False
    try:
        from torch._C._functorch import get_dynamic_layer_stack_depth
    except ImportError:
        return False  # not public
    return get_dynamic_layer_stack_depth() > 0


def nested_forward_mode() -> bool:
    """Whether PyTorch nests forward mode in forward mode.

    It then silently treats the derivatives of an ``autograd.Function`` as zero; only compositions
    of PyTorch's own ops are differentiated correctly.
    """
    if torch.compiler.is_compiling():
        return False
    levels = function_transforms() or []
    return sum(level.key().name == "Jvp" for level in levels) > 1
