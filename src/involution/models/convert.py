"""Public checkpoints, converted into this package's models.

Which names a checkpoint has was read in these files, of which nothing else is used:

* d-li14/involution, classification: ``cls/mmcls/models/backbones/rednet.py`` and
  ``cls/mmcls/models/utils/involution_naive.py``; the classifier's ``head.fc``: mmclassification,
  ``mmcls/models/heads/linear_head.py``.
* d-li14/involution, detection and segmentation: ``det/mmdet/models/backbones/rednet.py``,
  ``seg/mmseg/models/backbones/rednet.py``, which differ from the above in the stem's window, 7.
* PaddleClas: ``ppcls/arch/backbone/model_zoo/rednet.py``, and its base class in Paddle,
  ``python/paddle/vision/models/resnet.py``.
* The hosted model keras-io/involution: Keras 2 lists the variables of a SavedModel as
  ``variables/0`` and so on, layer by layer, those that are trained first.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable

import keras
import numpy as np

from involution import models
from involution.models import checkpoint_readers, numpy_reference, weights
from involution.models.checkpoint_readers import CheckpointError
from involution.models.rednet import VARIANTS

# Names of batch normalization's mean and variance.
STATISTICS = {
    checkpoint_readers.PYTORCH: ("running_mean", "running_var"),
    checkpoint_readers.PADDLE: ("_mean", "_variance"),
}
COUNTER = ".num_batches_tracked"
# What stands beside the backbone in detectors and segmenters.
HEADS = (
    "neck.",
    "rpn_head.",
    "roi_head.",
    "bbox_head.",
    "mask_head.",
    "decode_head.",
    "auxiliary_head.",
)
GROUP_CHANNELS, STEM_CHANNELS, TOP_CHANNELS, KERNEL_SIZE = 16, 32, 2048, 7

SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
# The variables of a layer of the keras.io example, in Keras 2's order: how its object graph calls
# them, and where they are here.
EXAMPLE = (
    ("layer_with_weights-0/kernel", "conv2d/kernel"),
    ("layer_with_weights-0/bias", "conv2d/bias"),
    ("layer_with_weights-1/gamma", "batch_normalization/gamma"),
    ("layer_with_weights-1/beta", "batch_normalization/beta"),
    ("layer_with_weights-2/kernel", "conv2d_1/kernel"),
    ("layer_with_weights-2/bias", "conv2d_1/bias"),
    ("layer_with_weights-1/moving_mean", "batch_normalization/moving_mean"),
    ("layer_with_weights-1/moving_variance", "batch_normalization/moving_variance"),
)
# Beside the variables of the model, in bundles that were saved in training.
IGNORED = ("save_counter", "optimizer/", "keras_api/")

POLICIES = ("float32", "float64")
# What the model may differ from NumPy in float64, relative to the largest number. A wrong layout
# differs by about 1; rounding in float32 by less than 1e-5, and by 1e-3 where an accelerator
# multiplies in TensorFloat-32. On JAX and PyTorch Keras normalizes in float32 in float64 too.
TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array of a checkpoint becomes a Keras weight, and which shape it has before."""

    convert: Callable
    shape_before: Callable


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a checkpoint is to become.

    Attributes:
        name, arguments: The function of ``involution.models.MODELS`` and its arguments.
        tensors: The checkpoint's arrays by the names of ``layouts``.
        layouts: From these names to pairs (name of the model's weight, layout).
        left_out: Names of tensors that the model has no place for.
        formula: From images (1, H, W, C) to what the model must give: arrays, channels last.
    """

    name: str
    arguments: dict
    tensors: dict
    layouts: dict
    left_out: tuple[str, ...]
    formula: Callable


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was converted, and how well.

    Attributes:
        name, arguments: The function of ``involution.models.MODELS`` and its arguments.
        parameters: Number of the model's parameters.
        left_out: Names of tensors that the model has no place for.
        difference: Largest difference of the model's outputs from those computed by NumPy in
            float64 from the checkpoint's own tensors, relative to the largest output.
        reloaded_difference: Largest difference of the model loaded from its new folder.
        lines: All of it in words.
    """

    name: str
    arguments: dict
    parameters: int
    left_out: tuple[str, ...]
    difference: float
    reloaded_difference: float
    lines: tuple[str, ...]


KERNEL = Layout(lambda a: a.transpose(2, 3, 1, 0), lambda s: (s[3], s[2], s[0], s[1]))
SAME = Layout(lambda a: a, lambda s: s)
TRANSPOSED = Layout(lambda a: a.T, lambda s: s[::-1])


def _tap_major(taps) -> Callable:
    """Reorders the first axis from group * taps + tap to tap * groups + group."""
    return lambda a: a.reshape(-1, taps, *a.shape[1:]).swapaxes(0, 1).reshape(a.shape)


def convert(source, destination) -> Conversion:
    """Converts a public checkpoint into a folder that ``involution.models.weights.load`` reads.

    Before the folder is written, the model's outputs for a seeded image are compared with those
    that NumPy computes in float64 from the checkpoint's own tensors in their own layout.

    Args:
        source: A checkpoint of d-li14/involution (PyTorch, ``.pth``) or PaddleClas
            (``.pdparams``), of which a RedNet becomes; or the folder of the SavedModel
            keras-io/involution, which becomes ``inn`` with the head ``"kernels"``. Checkpoints
            without a classifier, as of detectors, become models of the four stages' maps.
        destination: The folder to write: new or empty.

    Returns:
        A ``Conversion``.

    Raises:
        CheckpointError: The file is damaged or of no known kind; tensors are missing, unknown, of
            other shapes or not finite; the folder is not empty; Keras's dtype policy is neither
            float32 nor float64; or the comparison fails.
    """
    destination = pathlib.Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"The folder to write must be new or empty. Received: {destination}")
    if keras.config.dtype_policy().name not in POLICIES:
        raise CheckpointError(
            "Keras's dtype policy must be float32 or float64 to convert. "
            f"Received: {keras.config.dtype_policy().name}"
        )
    checkpoint = checkpoint_readers.read(source)
    plan = _plan(checkpoint, source)
    model = _model(plan, source)
    images = np.random.default_rng(0).random((1, 64, 64, plan.arguments["input_shape"][-1]))
    outputs = _outputs(model, images)
    with np.errstate(all="ignore"):  # negative variances, overflow: the difference tells
        difference = _difference(outputs, plan.formula(images), source)
    extra = {"source": {"kind": checkpoint.kind, "file": pathlib.Path(source).name}}
    try:
        weights.save(destination, plan.name, plan.arguments, model, extra)
    except OSError as error:
        raise CheckpointError(
            f"The folder to write must be writable. Received: {destination}: {error.strerror}"
        ) from error
    again = _outputs(weights.load(destination), images)
    reloaded = max(float(np.abs(a - b).max()) for a, b in zip(outputs, again, strict=True))
    last, count = outputs[-1], model.count_params()
    return Conversion(
        plan.name,
        plan.arguments,
        count,
        plan.left_out,
        difference,
        reloaded,
        (
            f"{plan.name} from a {checkpoint.kind} checkpoint: {len(plan.layouts)} tensors, "
            f"{count:,} parameters, {_words(plan.arguments)}",
            f"left out, {len(plan.left_out)} tensors: {weights.listed(plan.left_out) or 'none'}",
            f"check: for a random image the outputs differ by at most {difference:.1e} of the "
            "largest from NumPy's in float64 on the checkpoint's own tensors "
            f"(mean {last.mean():.3g}, standard deviation {last.std():.3g})",
            f"check: loaded again from {destination}, they differ by at most {reloaded:.1e}",
        ),
    )


def rednet_layouts(kind, blocks, stem_kernel_size=3, top=True) -> dict[str, tuple[str, Layout]]:
    """The tensors that a RedNet's checkpoint must have.

    Args:
        kind: ``"PyTorch"`` or ``"PaddlePaddle"``.
        blocks: Blocks of each stage.
        stem_kernel_size: Window of the stem's involution.
        top: Whether there is a classifier.

    Returns:
        From names, without the prefixes of whole systems, to pairs (name of the weight as
        ``named_weights`` has it, layout).
    """
    mean, variance = STATISTICS[kind]
    table: dict[str, tuple[str, Layout]] = {}

    def convolution(source, target):
        table[f"{source}.weight"] = (f"{target}/kernel", KERNEL)

    def normalization(source, target):
        for before, after in (
            ("weight", "gamma"),
            ("bias", "beta"),
            (mean, "moving_mean"),
            (variance, "moving_variance"),
        ):
            table[f"{source}.{before}"] = (f"{target}/{after}", SAME)

    def involution(source, target, taps):
        order = _tap_major(taps)
        span = Layout(lambda a: KERNEL.convert(order(a)), KERNEL.shape_before)
        convolution(f"{source}.conv1.conv", f"{target}/bottleneck/reduce")
        normalization(f"{source}.conv1.bn", f"{target}/bottleneck/normalization")
        table[f"{source}.conv2.conv.weight"] = (f"{target}/bottleneck/expand/kernel", span)
        table[f"{source}.conv2.conv.bias"] = (
            f"{target}/bottleneck/expand/bias",
            Layout(order, SAME.shape_before),
        )

    convolution("stem.0.conv", "stem_1_conv")
    normalization("stem.0.bn", "stem_1_bn")
    involution("stem.1", "stem_2_involution", stem_kernel_size**2)
    normalization("stem.2", "stem_2_bn")
    convolution("stem.4.conv", "stem_3_conv")
    normalization("stem.4.bn", "stem_3_bn")
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            source, target = f"layer{stage}.{block}", f"stage{stage}_block{block + 1}"
            convolution(f"{source}.conv1", f"{target}_1_conv")
            normalization(f"{source}.bn1", f"{target}_1_bn")
            involution(f"{source}.conv2", f"{target}_2_involution", KERNEL_SIZE**2)
            normalization(f"{source}.bn2", f"{target}_2_bn")
            convolution(f"{source}.conv3", f"{target}_3_conv")
            normalization(f"{source}.bn3", f"{target}_3_bn")
            if block == 0:
                convolution(f"{source}.downsample.0", f"{target}_shortcut_conv")
                normalization(f"{source}.downsample.1", f"{target}_shortcut_bn")
    if top:
        matrix = TRANSPOSED if kind == checkpoint_readers.PYTORCH else SAME
        table["fc.weight"] = ("logits/kernel", matrix)
        table["fc.bias"] = ("logits/bias", SAME)
    return table


def plain_names(names) -> dict[str, str | None]:
    """From a checkpoint's names to those of ``rednet_layouts``; None for what is left out.

    ``module.`` is what data-parallel training puts before all names, ``backbone.`` and ``head.``
    what mmclassification, mmdetection and mmsegmentation put before those of their parts.
    """
    plain: dict[str, str | None] = {}
    system = any(name.removeprefix("module.").startswith("backbone.") for name in names)
    for name in names:
        short = name.removeprefix("module.")
        if short.endswith(COUNTER) or (system and short.startswith(HEADS)):
            plain[name] = None
        elif system and short.startswith("head.fc."):
            plain[name] = short.removeprefix("head.")
        else:
            plain[name] = short.removeprefix("backbone.")
    return plain


def _plan(checkpoint, source) -> Plan:
    if checkpoint.kind == checkpoint_readers.TENSORFLOW:
        return _example_plan(checkpoint.tensors, source)
    return _rednet_plan(checkpoint, source)


def _rednet_plan(checkpoint, source) -> Plan:
    names = plain_names(checkpoint.tensors)
    tensors: dict[str, np.ndarray] = {}
    for name, plain in names.items():
        if plain in tensors:
            raise CheckpointError(
                "A tensor must have one name. "
                f"Received: {source}, with {weights.listed([plain])} under two prefixes"
            )
        if plain is not None:
            tensors[plain] = checkpoint.tensors[name]
    variant, blocks = _variant(tensors, source)
    top = any(name.startswith("fc.") for name in tensors)
    shapes = {name: array.shape for name, array in tensors.items()}
    weights.check_tensors(
        dict.fromkeys(rednet_layouts(checkpoint.kind, blocks, top=top)), shapes, source
    )
    size = _stem_kernel_size(shapes, source)
    layouts = rednet_layouts(checkpoint.kind, blocks, size, top)
    transposed = checkpoint.kind == checkpoint_readers.PYTORCH
    network = numpy_reference.RedNet(tensors, blocks, STATISTICS[checkpoint.kind], transposed)
    arguments = {"input_shape": (None, None, 3), "stem_kernel_size": size}
    if top:
        arguments["classes"] = shapes["fc.bias"][0] if shapes["fc.bias"] else 0
        matrix = (TOP_CHANNELS, arguments["classes"])
        # Before the model takes memory for as many classes.
        expected = {"fc.weight": layouts["fc.weight"][1].shape_before(matrix)}
        expected["fc.bias"] = matrix[1:]
        weights.check_tensors(expected, {name: shapes[name] for name in expected}, source)
    else:
        arguments.update(include_top=False, feature_maps=True)

    def formula(images):
        x = np.moveaxis(images, -1, 1)
        return [network.logits(x)] if top else [np.moveaxis(y, 1, -1) for y in network.maps(x)]

    left_out = tuple(name for name, plain in names.items() if plain is None)
    return Plan(variant, arguments, tensors, layouts, left_out, formula)


def _variant(tensors, source) -> tuple[str, tuple[int, ...]]:
    """Name and blocks of the network, from the names of its tensors."""
    counts = [0, 0, 0, 0]
    for name in tensors:
        found = re.match(r"layer([1-4])\.(\d{1,3})\.", name)
        if found:
            stage, block = int(found[1]) - 1, int(found[2])
            counts[stage] = max(counts[stage], block + 1)
    blocks = tuple(counts)
    known = {v.blocks: name for name, v in VARIANTS.items() if len(v.blocks) == len(blocks)}
    if blocks not in known:
        raise CheckpointError(
            "A checkpoint must be a RedNet's, with stages of "
            f"{', '.join(str(b) for b in known)} blocks layer1.0 to layer4.n. "
            f"Received: {source}, with {blocks}, and tensors such as "
            f"{weights.listed(tensors, 3)}"
        )
    return known[blocks], blocks


def _stem_kernel_size(shapes, source) -> int:
    shape = shapes["stem.1.conv2.conv.weight"]
    rows = shape[0] if shape else 0
    size = math.isqrt(rows * GROUP_CHANNELS // STEM_CHANNELS)
    if size % 2 == 0 or size**2 * STEM_CHANNELS != rows * GROUP_CHANNELS:
        raise CheckpointError(
            "stem.1.conv2.conv.weight must have 2 * K * K rows for an odd window K. "
            f"Received: {source}, with shape {shape}"
        )
    return size


def _example_plan(bundle, source) -> Plan:
    names = {}
    for layer in range(3):
        for index, (path, target) in enumerate(EXAMPLE):
            place = f"inv_{layer + 1}/sequential/{target}"
            names[f"variables/{8 * layer + index}"] = place
            names[f"layer_with_weights-{layer}/kernel_gen/{path}"] = place
    left_out = tuple(name for name in bundle if name.startswith(IGNORED))
    tensors, layouts = {}, {}
    for name, array in bundle.items():
        if name not in left_out:
            # Either name of a variable; an unknown one stays, and is told.
            place = names.get(name.removesuffix(SUFFIX), name)
            tensors[place] = array
            layouts[place] = (place, SAME)
    places = list(dict.fromkeys(names.values()))
    shapes = {name: array.shape for name, array in tensors.items()}
    weights.check_tensors(dict.fromkeys(places), shapes, source)

    def formula(images):
        layers = [[tensors[place] for place in places[i : i + 8]] for i in (0, 8, 16)]
        return numpy_reference.example_kernels(layers, images)

    arguments = {"input_shape": (None, None, 3), "head": "kernels"}
    return Plan("inn", arguments, tensors, layouts, left_out, formula)


def _model(plan, source) -> keras.Model:
    """The model with the checkpoint's weights."""
    broken = [
        name
        for name, array in plan.tensors.items()
        if array.dtype.kind != "f" or not np.isfinite(array).all()
    ]
    if broken:
        raise CheckpointError(
            "Weights must be finite floating-point numbers. "
            f"Received: {source}, with others in {len(broken)}: {weights.listed(broken)}"
        )
    model = models.MODELS[plan.name](**plan.arguments)
    variables = weights.named_weights(model)
    expected = {
        name: layout.shape_before(tuple(variables[target].shape))
        for name, (target, layout) in plan.layouts.items()
    }
    shapes = {name: array.shape for name, array in plan.tensors.items()}
    weights.check_tensors(expected, shapes, source)
    for name, (target, layout) in plan.layouts.items():
        weights.assign(variables[target], layout.convert(plan.tensors[name]))
    return model


def _outputs(model, images) -> list[np.ndarray]:
    images = images.astype(keras.config.dtype_policy().compute_dtype)
    outputs = keras.tree.flatten(model(images, training=False))
    return [np.array(keras.ops.convert_to_numpy(y)) for y in outputs]


def _difference(outputs, expected, source) -> float:
    """The largest difference, relative to the largest number; CheckpointError if it is large."""
    differences = [
        float(np.abs(y - want.reshape(y.shape)).max() / np.abs(want).max())
        for y, want in zip(outputs, expected, strict=True)
    ]
    # NaN does not pass either.
    largest = float(np.max(differences))
    if not largest <= TOLERANCE:
        raise CheckpointError(
            "A converted model must give the numbers of the checkpoint. "
            f"Received: {source}, where they differ by {largest:.1e} of the largest"
        )
    return largest


def _words(arguments) -> str:
    return ", ".join(f"{name}={value}" for name, value in arguments.items())
