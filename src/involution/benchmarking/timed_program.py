"""The same call a number of times in one program, on the backend in use.

Timing one call times the framework's way to it; here the calls follow each other inside one
compiled program (on PyTorch, which needs none, in a loop), each waiting for the one before.
"""

from collections.abc import Callable

import keras


def tensors(arrays, dtype) -> list:
    return [keras.ops.convert_to_tensor(a, dtype) for a in arrays]


def program(function, arguments, cotangent=None, calls: int = 1) -> Callable[[], list]:
    """``function(*arguments)``, ``calls`` times, ready to run: returns the last call's results.

    Args:
        function: From tensors to a tensor.
        arguments: Its tensors.
        cotangent: Gradient of the output; with one, the results are the output and the gradients
            of all arguments, without, the output alone.
        calls: How many calls one run makes.

    Returns:
        A function without arguments that runs the program, waits for it, and returns a list.
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
        touched = []
        for _ in range(calls):
            # Calls that are alike would be made once, and those that nobody reads not at all.
            with tf.control_dependencies(results):
                results = once(*arguments)
            touched += [tf.reshape(r, [-1])[0] for r in results]
        return results, touched

    # On CPUs a call returns when it is done.
    return lambda: repeated(*arguments)[0]


def _jax(function, arguments, cotangent, calls):
    import jax

    def once(*arguments):
        if cotangent is None:
            return [function(*arguments)]
        y, pullback = jax.vjp(function, *arguments)
        return [y, *pullback(cotangent)]

    def again(_, carried):
        arguments, results = carried
        # Something of the results, too small to count, goes into every argument: calls that are
        # alike would be made once, and what is made of some arguments alone would be too.
        touch = sum(r.reshape(-1)[0] for r in results) * 1e-30
        arguments = [a.at[(0,) * a.ndim].add(touch.astype(a.dtype)) for a in arguments]
        return arguments, once(*arguments)

    @jax.jit
    def repeated(*arguments):
        if calls == 1:
            return once(*arguments)
        carried = list(arguments), once(*arguments)
        return jax.lax.fori_loop(0, calls - 1, again, carried)[1]

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
