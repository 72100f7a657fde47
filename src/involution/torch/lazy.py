"""Involutions whose number of channels is that of their first input."""

import functools
from collections.abc import Callable
from typing import cast

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from involution.ops.validation import standardize_tuple
from involution.torch.modules import (
    MISNAMED,
    Involution1d,
    Involution2d,
    Involution3d,
    InvolutionNd,
    check_axes,
)
from involution.utils.arguments import names_required

# Weights with the channels of the input on axis 1.
_WEIGHTS = (
    "conv1.conv.weight",
    "kernel_generator.conv1.conv.weight",
    "kernel_generator.cv1.c.weight",
    "kernel_generator.conv2.conv.weight",
    "kernel_generator.query.weight",
    "projection.weight",
)


class _Uninitialized:
    """Skips the constructor of the involution, which needs the channels."""

    def __init__(self):
        nn.Module.__init__(self)  # type: ignore[arg-type]  # classes below derive from it


class _LazyInvolution(LazyModuleMixin, _Uninitialized, InvolutionNd):
    """An involution without parameters, until its first call or until a state dict is loaded."""

    cls_to_become: type[InvolutionNd]

    @names_required(
        "The channels are those of the first input: write {name}(3).",
        {**MISNAMED, **dict.fromkeys(("channels", "in_channels"), "those of the first input")},
    )
    def __init__(self, kernel_size=7, *, device=None, dtype=None, **arguments):
        super().__init__()
        become = cast(Callable, self.cls_to_become)
        self.make = functools.partial(become, kernel_size=kernel_size, **arguments)
        generator = arguments.get("kernel_generator")
        if isinstance(generator, nn.Module):
            self.kernel_generator = generator  # a child, for ``to`` and ``parameters``
        self._check_arguments(arguments)
        # PyTorch regards a module with such a parameter as uninitialized. Its device and dtype
        # become those of the parameters.
        factory = {"device": device, "dtype": dtype}
        self.factory = {name: value for name, value in factory.items() if value is not None}
        self.uninitialized = cast(Callable, UninitializedParameter)(**factory)

    def _check_arguments(self, arguments):
        """Raises the involution's errors, for a number of channels that the arguments allow."""
        options = {"group_channels": 16, **arguments}
        (channels,) = standardize_tuple("group_channels", options["group_channels"], 1)
        if options.get("groups") is not None:
            (channels,) = standardize_tuple("groups", options["groups"], 1)
        ratio = 4 if options.get("reduction_ratio") is None else options["reduction_ratio"]
        (ratio,) = standardize_tuple("reduction_ratio", ratio, 1)
        is_named = isinstance(options.get("kernel_generator"), str | None)
        generator = {} if is_named else {"kernel_generator": "static"}
        self.make(channels * ratio, device="meta", **generator)

    def initialize_parameters(self, x):
        if self.has_uninitialized_params():
            check_axes(x, self.rank, type(self).__name__)
            self._initialize(x.shape[1])

    def _initialize(self, channels):
        like = {"device": self.uninitialized.device, "dtype": self.uninitialized.dtype}
        # A function as generator has these arguments only if the user gives them.
        generator = self.make.keywords.get("kernel_generator")
        is_function = callable(generator) and not isinstance(generator, nn.Module)
        made = self.make(channels, **(self.factory if is_function else like)).to(**like)
        made.train(self.training)
        del self.uninitialized, self.make, self.factory
        for name, value in vars(made).items():
            if isinstance(value, dict) and name in vars(self):
                vars(self)[name].update(value)  # parameters, modules, hooks
            else:
                vars(self)[name] = value

    def _lazy_load_hook(self, state_dict, prefix, *arguments):
        if self.has_uninitialized_params() and f"{prefix}uninitialized" not in state_dict:
            found = [state_dict[prefix + n] for n in _WEIGHTS if prefix + n in state_dict]
            if found:
                self._initialize(found[0].shape[1])
        super()._lazy_load_hook(state_dict, prefix, *arguments)

    def extra_repr(self):
        if not self.has_uninitialized_params():
            return super().extra_repr()
        return ", ".join(f"{name}={value!r}" for name, value in self.make.keywords.items())


_DOC = """``Involution{0}d`` with the number of channels of its first input.

    It becomes an ``Involution{0}d`` at its first call, which must precede the construction of an
    optimizer, as for all lazy modules. Loading a state dict also creates the parameters, if the
    channels follow from it: not with ``"static"`` or a module as the generator.

    Args:
        kernel_size: As for ``Involution{0}d``.
        **arguments: All other arguments of ``Involution{0}d`` except ``channels``.

    Example:

    >>> import torch
    >>> from involution.torch import LazyInvolution{0}d
    >>> layer = LazyInvolution{0}d(3)
    >>> layer(torch.ones({1})).shape, type(layer).__name__
    (torch.Size([{1}]), 'Involution{0}d')
    """


class LazyInvolution1d(_LazyInvolution, Involution1d):
    __doc__ = _DOC.format(1, "1, 32, 8")
    cls_to_become = Involution1d


class LazyInvolution2d(_LazyInvolution, Involution2d):
    __doc__ = _DOC.format(2, "1, 32, 8, 8")
    cls_to_become = Involution2d


class LazyInvolution3d(_LazyInvolution, Involution3d):
    __doc__ = _DOC.format(3, "1, 32, 4, 4, 4")
    cls_to_become = Involution3d
