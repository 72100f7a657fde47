"""Conversion of public checkpoints to this package's models.

The names of tensors are those of these files; nothing else is taken from them:

* d-li14/involution, classification: ``cls/mmcls/models/backbones/rednet.py`` and
  ``cls/mmcls/models/utils/involution_naive.py``; the classifier's ``head.fc``: mmclassification,
  ``mmcls/models/heads/linear_head.py``.
* d-li14/involution, detection and segmentation: ``det/mmdet/models/backbones/rednet.py``,
  ``seg/mmseg/models/backbones/rednet.py``, which differ in the stem's kernel size, 7.
* PaddleClas: ``ppcls/arch/backbone/model_zoo/rednet.py``, and its base class in Paddle,
  ``python/paddle/vision/models/resnet.py``.
* LSNet: the published checkpoints, whose names are in ``lsnet_checkpoint.py``.
* The hosted model keras-io/involution: Keras 2 names the variables of a SavedModel
  ``variables/0`` and so on, layer by layer, trainable ones first.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable

import keras
import numpy as np

from involution import models
from involution.lsnet_variants import VARIANTS as LSNETS
from involution.models import checkpoint_readers, lsnet_checkpoint, numpy_reference, weights
from involution.models.checkpoint_readers import CheckpointError
from involution.models.numpy_lsnet import LSNet
from involution.models.rednet import VARIANTS
from involution.models.weight_map import IDENTITY, KERNEL, TRANSPOSE, WeightMap, tap_major
from involution.utils.comparison import relative_error
from involution.utils.errors import WriteError

# Names of batch normalization's moving mean and variance.
STATISTICS = {
    checkpoint_readers.PYTORCH: ("running_mean", "running_var"),
    checkpoint_readers.PADDLE: ("_mean", "_variance"),
}
COUNTER = ".num_batches_tracked"
# The parts of detection and segmentation models other than the backbone.
DETECTION_HEADS = (
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
# The variables of a layer of the keras.io example in Keras 2's order: their names in its object
# graph, and here.
KERAS_IO_VARIABLES = (
    ("layer_with_weights-0/kernel", "conv2d/kernel"),
    ("layer_with_weights-0/bias", "conv2d/bias"),
    ("layer_with_weights-1/gamma", "batch_normalization/gamma"),
    ("layer_with_weights-1/beta", "batch_normalization/beta"),
    ("layer_with_weights-2/kernel", "conv2d_1/kernel"),
    ("layer_with_weights-2/bias", "conv2d_1/bias"),
    ("layer_with_weights-1/moving_mean", "batch_normalization/moving_mean"),
    ("layer_with_weights-1/moving_variance", "batch_normalization/moving_variance"),
)
# Variables that do not belong to the model, in bundles saved during training.
IGNORED = ("save_counter", "optimizer/", "keras_api/")

POLICIES = ("float32", "float64")
# Maximum error of the model relative to the NumPy reference. A wrong layout gives about 1; rounding
# gives less than 1e-5 in float32, and 1e-3 in TensorFloat-32. On JAX and PyTorch Keras computes
# batch normalization in float32 even in float64.
TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """How a checkpoint is converted.

    Attributes:
        name, arguments: The function of ``involution.models.MODELS`` and its arguments.
        tensors: The checkpoint's arrays by normalized name.
        weight_maps: Dictionary from these names to pairs (name of the model's weight, map).
        unused: Names of tensors that the model does not have.
        reference: From images (1, H, W, C) to the expected outputs: arrays, channels last.
        image_size: Side of the images for the reference.
    """

    name: str
    arguments: dict
    tensors: dict
    weight_maps: dict
    unused: tuple[str, ...]
    reference: Callable
    image_size: int = 64


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        name, arguments: The function of ``involution.models.MODELS`` and its arguments.
        parameters: Number of the model's parameters.
        unused: Names of tensors that the model does not have.
        max_relative_error: Largest difference between the model's outputs and those of the NumPy
            reference in float64 on the checkpoint's tensors, relative to the largest output.
        reload_error: Largest absolute difference between the outputs of the model and of the
            model loaded from the new folder.
        lines: A report.
    """

    name: str
    arguments: dict
    parameters: int
    unused: tuple[str, ...]
    max_relative_error: float
    reload_error: float
    lines: tuple[str, ...]


def convert(source, destination) -> Conversion:
    """Converts a public checkpoint to a folder for ``involution.models.weights.load``.

    Before the folder is written, the model's outputs for a seeded random image are compared with a
    NumPy reference in float64 that uses the checkpoint's tensors in their own layout.

    Args:
        source: A RedNet checkpoint of d-li14/involution (PyTorch, ``.pth``) or PaddleClas
            (``.pdparams``); a checkpoint of LSNet (``.pth``); or the folder of the SavedModel
            keras-io/involution, which becomes ``inn`` with the head ``"kernels"``. RedNets without
            a classifier, such as those of detectors, become models with the feature maps of all
            four stages as outputs; an LSNet without one, a model with the last feature map.
        destination: The folder to write, new or empty.

    Returns:
        A ``Conversion``.

    Raises:
        CheckpointError: The file is damaged or of an unknown format; tensors are missing, unknown,
            of wrong shape or not finite; the folder is not empty; Keras's dtype policy is neither
            float32 nor float64; or the outputs differ.
    """
    destination = pathlib.Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(
            f"`destination` must be a new or empty folder. Received: {destination}"
        )
    if keras.config.dtype_policy().name not in POLICIES:
        raise CheckpointError(
            "Keras's dtype policy must be float32 or float64 for a conversion. "
            f"Received: {keras.config.dtype_policy().name}"
        )
    checkpoint = checkpoint_readers.read(source)
    plan = _plan(checkpoint, source)
    model = _model(plan, source)
    side, channels = plan.image_size, plan.arguments["input_shape"][-1]
    images = np.random.default_rng(0).random((1, side, side, channels))
    outputs = _outputs(model, images)
    with np.errstate(all="ignore"):  # negative variances and overflow make the comparison fail
        error = _max_relative_error(outputs, plan.reference(images), source)
    extra = {"source": {"kind": checkpoint.kind, "file": pathlib.Path(source).name}}
    try:
        weights.save(destination, plan.name, plan.arguments, model, extra)
    except WriteError:
        raise
    except OSError as failure:
        raise CheckpointError(
            f"`destination` must be writable. Received: {destination}: {failure.strerror}"
        ) from failure
    reloaded = _outputs(weights.load(destination), images)
    reload_error = max(float(np.abs(a - b).max()) for a, b in zip(outputs, reloaded, strict=True))
    last, count = outputs[-1], model.count_params()
    return Conversion(
        plan.name,
        plan.arguments,
        count,
        plan.unused,
        error,
        reload_error,
        (
            f"{plan.name} from a {checkpoint.kind} checkpoint: {len(plan.weight_maps)} tensors, "
            f"{count:,} parameters, {_format_arguments(plan.arguments)}",
            f"unused: {len(plan.unused)} tensors: {weights.format_names(plan.unused) or 'none'}",
            "verified: for a random image the outputs match a NumPy reference in float64; maximum "
            f"relative error {error:.1e} (mean {last.mean():.3g}, standard deviation "
            f"{last.std():.3g})",
            f"verified: reloaded from {destination}; maximum absolute error {reload_error:.1e}",
        ),
    )


def rednet_weight_maps(
    kind, blocks, stem_kernel_size=3, top=True
) -> dict[str, tuple[str, WeightMap]]:
    """The tensors of a RedNet checkpoint.

    Args:
        kind: ``"PyTorch"`` or ``"PaddlePaddle"``.
        blocks: Number of blocks of each stage.
        stem_kernel_size: Kernel size of the stem's involution.
        top: Whether the checkpoint has a classifier.

    Returns:
        A dictionary from names without prefixes (see ``strip_prefixes``) to pairs (name of the
        weight in ``named_weights``, map).
    """
    mean, variance = STATISTICS[kind]
    table: dict[str, tuple[str, WeightMap]] = {}

    def convolution(source, target):
        table[f"{source}.weight"] = (f"{target}/kernel", KERNEL)

    def normalization(source, target):
        for suffix, weight in (
            ("weight", "gamma"),
            ("bias", "beta"),
            (mean, "moving_mean"),
            (variance, "moving_variance"),
        ):
            table[f"{source}.{suffix}"] = (f"{target}/{weight}", IDENTITY)

    def involution(source, target, taps):
        reorder = tap_major(taps)
        expand = WeightMap(lambda a: KERNEL.convert(reorder(a)), KERNEL.source_shape)
        convolution(f"{source}.conv1.conv", f"{target}/bottleneck/reduce")
        normalization(f"{source}.conv1.bn", f"{target}/bottleneck/normalization")
        table[f"{source}.conv2.conv.weight"] = (f"{target}/bottleneck/expand/kernel", expand)
        table[f"{source}.conv2.conv.bias"] = (
            f"{target}/bottleneck/expand/bias",
            WeightMap(reorder, IDENTITY.source_shape),
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
        matrix = TRANSPOSE if kind == checkpoint_readers.PYTORCH else IDENTITY
        table["fc.weight"] = ("logits/kernel", matrix)
        table["fc.bias"] = ("logits/bias", IDENTITY)
    return table


def strip_prefixes(names) -> dict[str, str | None]:
    """A dictionary from a checkpoint's names to those of ``rednet_weight_maps``; None for unused
    tensors.

    Data-parallel training prepends ``module.`` to all names; mmclassification, mmdetection and
    mmsegmentation prepend ``backbone.`` and ``head.`` to those of their parts.
    """
    stripped: dict[str, str | None] = {}
    has_parts = any(name.removeprefix("module.").startswith("backbone.") for name in names)
    for name in names:
        short = name.removeprefix("module.")
        if short.endswith(COUNTER) or (has_parts and short.startswith(DETECTION_HEADS)):
            stripped[name] = None
        elif has_parts and short.startswith("head.fc."):
            stripped[name] = short.removeprefix("head.")
        else:
            stripped[name] = short.removeprefix("backbone.")
    return stripped


def _plan(checkpoint, source) -> ConversionPlan:
    if checkpoint.kind == checkpoint_readers.TENSORFLOW:
        return _keras_io_plan(checkpoint.tensors, source)
    if lsnet_checkpoint.is_lsnet(name.removeprefix("module.") for name in checkpoint.tensors):
        return _lsnet_plan(checkpoint, source)
    return _rednet_plan(checkpoint, source)


def _lsnet_plan(checkpoint, source) -> ConversionPlan:
    stripped = {name: name.removeprefix("module.") for name in checkpoint.tensors}
    unused = tuple(n for n, short in stripped.items() if short.endswith(lsnet_checkpoint.UNUSED))
    tensors = {
        short: checkpoint.tensors[name] for name, short in stripped.items() if name not in unused
    }
    shapes = {name: array.shape for name, array in tensors.items()}
    width = (shapes.get(lsnet_checkpoint.FIRST) or (0,))[0]
    name = lsnet_checkpoint.variant_of(width)
    if name is None:
        widths = ", ".join(str(variant.widths[0]) for variant in LSNETS.values())
        raise CheckpointError(
            f"{lsnet_checkpoint.FIRST} must have the width of an LSNet, {widths}. "
            f"Received: {source}, with shape {shapes.get(lsnet_checkpoint.FIRST)}"
        )
    variant = LSNETS[name]
    heads = [h for h in ("head", "head_dist") if any(n.startswith(f"{h}.") for n in tensors)]
    heads = ["head", "head_dist"] if "head_dist" in heads else heads
    weight_maps = lsnet_checkpoint.weight_maps(variant, heads)
    weights.check_tensors(dict.fromkeys(weight_maps), shapes, source)
    arguments = {"input_shape": (None, None, 3), "distilled": "head_dist" in heads}
    if heads:
        arguments["classes"] = (shapes["head.l.bias"] or (0,))[0]
        # Checked before memory is allocated for this number of classes.
        classifiers = {}
        for head in heads:
            matrix = (arguments["classes"], variant.widths[-1])
            classifiers.update({f"{head}.l.weight": matrix, f"{head}.l.bias": matrix[:1]})
        weights.check_tensors(classifiers, {n: shapes[n] for n in classifiers}, source)
    else:
        arguments["include_top"] = False
    network = LSNet(tensors, variant.blocks, variant.heads, variant.key_channels)

    def reference(images):
        x = np.moveaxis(images, -1, 1)
        return [network.logits(x) if heads else np.moveaxis(network.features(x), 1, -1)]

    # The size to which the attention's biases belong.
    return ConversionPlan(name, arguments, tensors, weight_maps, unused, reference, 224)


def _rednet_plan(checkpoint, source) -> ConversionPlan:
    names = strip_prefixes(checkpoint.tensors)
    tensors: dict[str, np.ndarray] = {}
    for name, stripped in names.items():
        if stripped in tensors:
            raise CheckpointError(
                "Tensors must have unique names without their prefixes. "
                f"Received: {source}, with {weights.format_names([stripped])} under two prefixes"
            )
        if stripped is not None:
            tensors[stripped] = checkpoint.tensors[name]
    variant, blocks = _variant(tensors, source)
    top = any(name.startswith("fc.") for name in tensors)
    shapes = {name: array.shape for name, array in tensors.items()}
    weights.check_tensors(
        dict.fromkeys(rednet_weight_maps(checkpoint.kind, blocks, top=top)), shapes, source
    )
    size = _stem_kernel_size(shapes, source)
    weight_maps = rednet_weight_maps(checkpoint.kind, blocks, size, top)
    transposed = checkpoint.kind == checkpoint_readers.PYTORCH
    network = numpy_reference.RedNet(tensors, blocks, STATISTICS[checkpoint.kind], transposed)
    arguments = {"input_shape": (None, None, 3), "stem_kernel_size": size}
    if top:
        arguments["classes"] = shapes["fc.bias"][0] if shapes["fc.bias"] else 0
        matrix = (TOP_CHANNELS, arguments["classes"])
        # Checked before memory is allocated for this number of classes.
        expected = {"fc.weight": weight_maps["fc.weight"][1].source_shape(matrix)}
        expected["fc.bias"] = matrix[1:]
        weights.check_tensors(expected, {name: shapes[name] for name in expected}, source)
    else:
        arguments.update(include_top=False, feature_maps=True)

    def reference(images):
        x = np.moveaxis(images, -1, 1)
        return [network.logits(x)] if top else [np.moveaxis(y, 1, -1) for y in network.maps(x)]

    unused = tuple(name for name, stripped in names.items() if stripped is None)
    return ConversionPlan(variant, arguments, tensors, weight_maps, unused, reference)


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
            "A checkpoint must have the blocks layer1.0 to layer4.n of a RedNet, in numbers "
            f"{', '.join(str(b) for b in known)}. "
            f"Received: {source}, with {blocks}, and tensors such as "
            f"{weights.format_names(tensors, 3)}"
        )
    return known[blocks], blocks


def _stem_kernel_size(shapes, source) -> int:
    shape = shapes["stem.1.conv2.conv.weight"]
    rows = shape[0] if shape else 0
    size = math.isqrt(rows * GROUP_CHANNELS // STEM_CHANNELS)
    if size % 2 == 0 or size**2 * STEM_CHANNELS != rows * GROUP_CHANNELS:
        raise CheckpointError(
            "stem.1.conv2.conv.weight must have 2 * K * K rows for an odd kernel size K. "
            f"Received: {source}, with shape {shape}"
        )
    return size


def _keras_io_plan(bundle, source) -> ConversionPlan:
    names = {}
    for layer in range(3):
        for index, (path, target) in enumerate(KERAS_IO_VARIABLES):
            target_name = f"inv_{layer + 1}/sequential/{target}"
            names[f"variables/{8 * layer + index}"] = target_name
            names[f"layer_with_weights-{layer}/kernel_gen/{path}"] = target_name
    unused = tuple(name for name in bundle if name.startswith(IGNORED))
    tensors, weight_maps = {}, {}
    for name, array in bundle.items():
        if name not in unused:
            # check_tensors reports unknown names.
            target_name = names.get(name.removesuffix(SUFFIX), name)
            tensors[target_name] = array
            weight_maps[target_name] = (target_name, IDENTITY)
    target_names = list(dict.fromkeys(names.values()))
    shapes = {name: array.shape for name, array in tensors.items()}
    weights.check_tensors(dict.fromkeys(target_names), shapes, source)

    def reference(images):
        layers = [[tensors[name] for name in target_names[i : i + 8]] for i in (0, 8, 16)]
        return numpy_reference.keras_io_kernels(layers, images)

    arguments = {"input_shape": (None, None, 3), "head": "kernels"}
    return ConversionPlan("inn", arguments, tensors, weight_maps, unused, reference)


def _model(plan, source) -> keras.Model:
    """The model with the checkpoint's weights."""
    invalid = [
        name
        for name, array in plan.tensors.items()
        if array.dtype.kind != "f" or not np.isfinite(array).all()
    ]
    if invalid:
        raise CheckpointError(
            "Weights must be finite floating-point numbers. Received: "
            f"{source}, with other values in {len(invalid)}: {weights.format_names(invalid)}"
        )
    model = models.MODELS[plan.name](**plan.arguments)
    variables = weights.named_weights(model)
    expected = {
        name: weight_map.source_shape(tuple(variables[target].shape))
        for name, (target, weight_map) in plan.weight_maps.items()
    }
    shapes = {name: array.shape for name, array in plan.tensors.items()}
    weights.check_tensors(expected, shapes, source)
    for name, (target, weight_map) in plan.weight_maps.items():
        weights.assign(variables[target], weight_map.convert(plan.tensors[name]))
    return model


def _outputs(model, images) -> list[np.ndarray]:
    images = images.astype(keras.config.dtype_policy().compute_dtype)
    outputs = keras.tree.flatten(model(images, training=False))
    return [np.array(keras.ops.convert_to_numpy(y)) for y in outputs]


def _max_relative_error(outputs, expected, source) -> float:
    """The largest difference relative to the largest output; CheckpointError above TOLERANCE."""
    error = max(
        relative_error(y, want.reshape(y.shape)) for y, want in zip(outputs, expected, strict=True)
    )
    if error > TOLERANCE:
        raise CheckpointError(
            "The outputs of a converted model must match those of the checkpoint. "
            f"Received: {source}, with a maximum relative error of {error:.1e}"
        )
    return error


def _format_arguments(arguments) -> str:
    return ", ".join(f"{name}={value}" for name, value in arguments.items())
