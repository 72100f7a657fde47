"""Upsampling with generated kernels, in one to three dimensions."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import keras

from involution.kernel_generators.base import KernelGenerator, training_argument
from involution.kernel_generators.carafe import Carafe
from involution.layers.generated import GeneratedInvolution
from involution.ops.problem import output_sizes
from involution.ops.validation import check_axes, is_shape_compatible, standardize_tuple
from involution.ops.window import Window
from involution.utils.arguments import MISNAMED, names_required

_check_names = names_required(
    "An upsampling involution keeps the input's channels: for UpSampling{rank}D(2) write "
    "{name}(2).",
    {
        **MISNAMED,
        "scale_factor": "use `size`",
        "strides": "use `size`",
        "interpolation": "the kernels are generated",
    },
)


class InvolutionUpSamplingND(GeneratedInvolution):
    """Upsampling in ``rank`` dimensions: the base of InvolutionUpSampling1D, 2D and 3D."""

    generators: ClassVar[Mapping[str, type[KernelGenerator]]] = {"carafe": Carafe}

    @_check_names
    def __init__(
        self,
        size=2,
        *,
        kernel_size=5,
        padding="same",
        dilation_rate=1,
        groups=1,
        kernel_generator=None,
        return_kernel=False,
        group_layout="contiguous",
        data_format=None,
        implementation=None,
        kernel_softmax=True,
        kernel_dropout=0.0,
        **kwargs,
    ) -> None:
        window = Window(
            kernel_size,
            padding=padding,
            dilation_rate=dilation_rate,
            groups=groups,
            group_layout=group_layout,
            data_format=data_format,
            rank=self.rank,
        )
        size = standardize_tuple("size", size, self.rank)
        super().__init__(
            dataclasses.replace(window, upsampling=size),
            groups=groups,
            kernel_generator=kernel_generator,
            return_kernel=return_kernel,
            implementation=implementation,
            kernel_softmax=kernel_softmax,
            kernel_dropout=kernel_dropout,
            **kwargs,
        )
        self.size = size

    def build(self, inputs_shape, guide_shape=None):
        def generator_input_shape(shape):
            features = self.generator_input_shape(shape)
            return features if guide_shape is None else [features, guide_shape]

        if guide_shape is not None:
            self._check_guide(inputs_shape, guide_shape)
        self._has_guide = guide_shape is not None
        self.build_generator(inputs_shape, generator_input_shape)

    def _check_guide(self, input_shape, guide_shape):
        check_axes(self, input_shape, self.rank)
        window, sizes = self.window, self._output_sizes(input_shape)
        expected = window.shape(input_shape[0], sizes, None)
        if not is_shape_compatible(expected, tuple(guide_shape)):
            raise ValueError(
                "`guide` must have the input's batch size and the output's spatial sizes: "
                f"{expected}. Received: guide.shape={tuple(guide_shape)}"
            )

    def call(self, inputs, guide=None, training=None):  # type: ignore[override]  # Keras passes names
        if (guide is not None) != self._has_guide:
            built = "with" if self._has_guide else "without"
            raise ValueError(
                f"The layer was built {built} a guide, and must be called {built} one. "
                f"Received: guide={'None' if guide is None else 'a tensor'}"
            )
        if guide is None:
            return self.run_call(training, inputs=inputs)
        self._check_guide(inputs.shape, guide.shape)
        return self.run_call(training, inputs=inputs, guide=guide)

    def _kernel_map(self, inputs, *, guide=None, **context):
        features = self.generator_input(inputs)
        if guide is not None:
            features = [features, guide]
        return self.kernel_generator(features, **training_argument())

    def _generator_projection(self, inputs):
        return None

    def _output_sizes(self, input_shape) -> tuple[int | None, ...]:
        return output_sizes(self.window, tuple(input_shape))

    def compute_output_shape(self, inputs_shape, guide_shape=None):
        return super().compute_output_shape(inputs_shape)

    def _window_config(self) -> dict:
        arguments = super()._window_config()
        del arguments["strides"]
        return {"size": self.size, **arguments}


_DOC = """Upsampling {0}, by kernels that are generated for each position of the fine grid.

    Each output position has its own kernel, the weights of a sum over the window around the
    corresponding input position. The default generator is that of CARAFE, a replacement for
    bilinear interpolation in decoders and feature pyramids. The input is never copied to the fine
    grid.

    >>> import numpy as np, involution
    >>> x, fine = np.ones({1}, "float32"), np.ones({2}, "float32")
    >>> tuple(involution.InvolutionUpSampling{3}D(2)(x).shape)
    {4}
    >>> tuple(involution.InvolutionUpSampling{3}D(2)(x, guide=fine).shape)
    {4}

    Args:
        size: Integer, or one for each spatial dimension: the upsampling factor. The only positional
            argument.
        kernel_size: Integer, or one for each spatial dimension: the window, in input positions.
        padding: As for ``involution.ops.involution``.
        dilation_rate: Integer, or one for each spatial dimension.
        groups: Number of groups; divides the channels.
        kernel_generator: A Keras layer from features (B, *spatial, C), or with a guide from the
            list [features, guide], to a kernel map (B, *out_spatial, taps * groups), channels
            tap-major; ``"carafe"`` or None: ``kernel_generators.Carafe()``. A generator with
            weights can belong to only one layer.
        return_kernel: Whether to return (output, kernel) or only the output.
        group_layout: ``"contiguous"`` or ``"interleaved"``; see ``involution.ops.involution``.
        data_format: ``"channels_last"``, ``"channels_first"``, or None for Keras's setting.
        implementation: See ``involution.ops.involution``.
        kernel_softmax: Whether to apply softmax to the weights of each window, as in CARAFE, which
            keeps the outputs in the range of the inputs; ``"in_bounds"``: to those inside the
            input, so that borders are not darkened.
        kernel_dropout: Dropout rate on kernel weights.
        **kwargs: ``name``, ``dtype`` and so on, as in ``keras.layers.Layer``.

    Call arguments:
        inputs: Tensor (B, *spatial, C), or (B, C, *spatial) for ``"channels_first"``.
        guide: None, or a tensor (B, *out_spatial, D) or (B, D, *out_spatial): features of the fine
            grid, such as those of an encoder, from which the kernels are generated too. In all
            calls of a layer or in none.
        training: As for ``involution.Involution2D``.

    Returns:
        Tensor (B, *out_spatial, C), or (B, C, *out_spatial), with ``size`` times the windows of the
        input; with ``return_kernel`` also the kernels.

    Raises:
        TypeError: More than one positional argument, or an argument of another library.
        ValueError: An argument is out of its range, the groups do not divide the channels, the
            guide has other sizes than the output, or the generator's map does not fit the output.

    Source: Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures", ICCV 2019,
    arXiv:1905.02188; with a guide Lu et al., "FADE", ECCV 2022, arXiv:2207.10392.
    """


@keras.saving.register_keras_serializable(package="involution")
class InvolutionUpSampling1D(InvolutionUpSamplingND):
    __doc__ = _DOC.format("of sequences", "(1, 9, 8)", "(1, 18, 4)", 1, "(1, 18, 8)")
    rank = 1


@keras.saving.register_keras_serializable(package="involution")
class InvolutionUpSampling2D(InvolutionUpSamplingND):
    __doc__ = _DOC.format("of images", "(1, 9, 7, 8)", "(1, 18, 14, 4)", 2, "(1, 18, 14, 8)")
    rank = 2


@keras.saving.register_keras_serializable(package="involution")
class InvolutionUpSampling3D(InvolutionUpSamplingND):
    __doc__ = _DOC.format(
        "of volumes", "(1, 3, 4, 5, 8)", "(1, 6, 8, 10, 4)", 3, "(1, 6, 8, 10, 8)"
    )
    rank = 3
