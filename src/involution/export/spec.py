"""The function that is exported: from tensors by position to a dictionary of tensors."""

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import tree

from involution.utils.errors import InputError

# Sizes of unknown dimensions by batch size, different for each verified batch.
UNKNOWN_SIZES = {1: 33, 5: 40}


@dataclasses.dataclass(frozen=True)
class ExportSpec:
    """A model as a function from tensors to a dictionary of tensors."""

    model: keras.Model
    structure: Any
    """The structure of the model's input, with an ``InputSpec`` for each tensor."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()

    @property
    def has_unknown_sizes(self) -> bool:
        return any(None in spec.shape[1:] for spec in self.specs)

    @property
    def remedy(self) -> str:
        """What to try if the exporter fails, for error messages."""
        if self.has_unknown_sizes:
            return "give `input_shape`, on the command line --image-size"
        return "another backend's exporter may work"

    @property
    def specs(self) -> list[keras.InputSpec]:
        return tree.flatten(self.structure)

    def call(self, *tensors) -> dict:
        outputs = self.model(tree.pack_sequence_as(self.structure, tensors), training=False)
        paths, values = zip(*tree.flatten_with_path(outputs), strict=True)
        if paths == ((),):
            return {"output": values[0]}
        names = ["_".join(map(str, path)) for path in paths]
        if not any(isinstance(path[0], str) for path in paths) or len({*names, *self.inputs}) < len(
            names
        ) + len(self.inputs):
            names = [f"output_{i}" for i in range(len(names))]
        return dict(zip(names, values, strict=True))

    def shapes(self, batch) -> list[tuple[int, ...]]:
        """The shape of each input; unknown dimensions of an input get different sizes."""
        return [
            tuple(
                batch if axis == 0 else UNKNOWN_SIZES.get(batch, 35) + 3 * axis if n is None else n
                for axis, n in enumerate(spec.shape)
            )
            for spec in self.specs
        ]

    def random_inputs(self, batch) -> list[np.ndarray]:
        rng = np.random.default_rng(batch)
        return [
            rng.standard_normal(shape).astype(spec.dtype)
            if "float" in spec.dtype
            else rng.integers(0, 2, shape).astype(spec.dtype)
            for spec, shape in zip(self.specs, self.shapes(batch), strict=True)
        ]

    def random_images(self, batch) -> list[np.ndarray]:
        """uint8 images of another size than the model's input, for each verified batch."""
        rng = np.random.default_rng(batch)
        side = UNKNOWN_SIZES[batch]
        return [rng.integers(0, 256, (batch, side, side + 9, 3), "uint8")]


def make_spec(model, input_shape) -> ExportSpec:
    """The ``ExportSpec`` of a model; ``input_shape`` (without the batch) replaces unknown sizes.

    Raises:
        InputError: The model is not built, or ``input_shape`` is missing or does not fit.
    """
    if not model.built:
        raise InputError(
            "The exported model must be built: call it on an input first. "
            f"Received: {model.name}, which is not built"
        )
    tensors = _inputs(model)
    given = None if input_shape is None else tuple(input_shape)
    if tensors is None:
        if given is None or not _is_compatible((None,) * len(given), given):
            raise InputError(
                "A model without symbolic inputs requires `input_shape`. "
                f"Received: {model.name}, input_shape={input_shape!r}"
            )
        spec = keras.InputSpec(shape=(None, *given), dtype=model.input_dtype)
        return ExportSpec(model, spec, ("input",))
    flat = tree.flatten(tensors)
    shapes = [(None, *tensor.shape[1:]) for tensor in flat]
    if given is not None:
        expected = shapes[0][1:]
        if len(shapes) > 1 or not _is_compatible(expected, given):
            raise InputError(
                "`input_shape` must be compatible with the model's single input, where None is any "
                f"size: {', '.join(str(shape[1:]) for shape in shapes)}. "
                f"Received: input_shape={input_shape!r}"
            )
        shapes = [(None, *given)]
    specs = [
        keras.InputSpec(shape=shape, dtype=keras.backend.standardize_dtype(tensor.dtype))
        for shape, tensor in zip(shapes, flat, strict=True)
    ]
    automatic = [t.name.startswith(("keras_tensor", "input_layer")) for t in flat]
    names = tuple(
        ("input" if len(flat) == 1 else f"input_{i}") if automatic[i] else tensor.name
        for i, tensor in enumerate(flat)
    )
    return ExportSpec(model, tree.pack_sequence_as(tensors, specs), names)


def _inputs(model):
    """The structure of a model's symbolic input; None for a subclass that has none."""
    try:
        return model.input
    except AttributeError:
        inputs = getattr(model, "inputs", None)
        return inputs[0] if inputs else None


def _is_compatible(expected, given) -> bool:
    return len(expected) == len(given) and all(
        (n is None or (isinstance(n, int) and n > 0)) and m in (None, n)
        for m, n in zip(expected, given, strict=True)
    )
