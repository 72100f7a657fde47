"""Repeated calls in one compiled program, for timing.

The time of a single call would include the framework's dispatch overhead. Here calls run in
sequence inside one compiled program (on PyTorch in a loop), each dependent on the previous one.
"""

from collections.abc import Callable

import keras


def tensors(arrays, dtype) -> list:
    return [keras.ops.convert_to_tensor(a, dtype) for a in arrays]


def repeat(function, arguments, cotangent=None, calls: int = 1) -> Callable[[], list]:
    """A program of ``calls`` calls ``function(*arguments)``.

    Args:
        function: From tensors to a tensor.
        arguments: Its arguments.
        cotangent: The output's gradient; if given, the results are the output and the gradients of
            all arguments, otherwise the output.
        calls: Number of calls per run.

    Returns:
        A function without arguments that runs the program synchronously and returns the results of
        its last call as a list.
    """
    make = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[keras.config.backend()]
    return make(function, list(arguments), cotangent, calls)


def _tensorflow(function, arguments, cotangent, calls):
    import tensorflow as tf

    def once(*arguments):
        if cotangent is None:
            return [function(*arguments)]
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            y = function(*arguments)
        return [y, *tape.gradient(y, arguments, cotangent)]

    @tf.function(autograph=False)
    def repeated(*arguments):
        results: list = []
        dependencies = []
        for _ in range(calls):
            # Prevents common-subexpression and dead-code elimination of the calls.
            with tf.control_dependencies(results):
                results = once(*arguments)
            dependencies += [tf.reshape(r, [-1])[0] for r in results]
        return results, dependencies

    # Calls on CPUs are synchronous.
    return lambda: repeated(*arguments)[0]


def _jax(function, arguments, cotangent, calls):
    import jax

    def once(*arguments):
        if cotangent is None:
            return [function(*arguments)]
        y, pullback = jax.vjp(function, *arguments)
        return [y, *pullback(cotangent)]

    def body(_, carry):
        arguments, results = carry
        # A negligible part of the results enters every argument: XLA would hoist loop-invariant
        # operations, also those that depend on some of the arguments only.
        dependency = sum(r.reshape(-1)[0] for r in results) * 1e-30
        arguments = [a.at[(0,) * a.ndim].add(dependency.astype(a.dtype)) for a in arguments]
        return arguments, once(*arguments)

    @jax.jit
    def repeated(*arguments):
        if calls == 1:
            return once(*arguments)
        carry = list(arguments), once(*arguments)
        return jax.lax.fori_loop(0, calls - 1, body, carry)[1]

    return lambda: jax.block_until_ready(repeated(*arguments))


def _torch(function, arguments, cotangent, calls):
    import torch

    def once():
        if cotangent is None:
            with torch.no_grad():
                return [function(*arguments)]
        leaves = [a.detach().requires_grad_() for a in arguments]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]

    def repeated():
        for _ in range(calls - 1):
            once()
        return once()

    return repeated
