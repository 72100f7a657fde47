"""A user's program, which `make lint` checks with ``mypy --strict``; it is not run.

A public function without types would be an error here, as in the programs of users.
"""

import pathlib

import keras
import numpy as np
import torch

import involution
import involution.onnx
from involution import (
    Involution,
    Involution1D,
    Involution1DTranspose,
    Involution2D,
    Involution3D,
    InvolutionUpSampling2D,
    compat,
    data,
    hub,
    kernel_generators,
    models,
    ops,
    visualize,
)
from involution.export import export
from involution.models import weights
from involution.models.convert import convert
from involution.saving.classifier import Classifier
from involution.saving.classifier import load as load_classifier
from involution.torch import Involution1d, Involution2d, functional, generators, rednet26
from involution.training import experiment
from involution.utils.errors import InputError


class Block(keras.layers.Layer):  # type: ignore[misc]  # Keras has no types
    def __init__(self) -> None:
        super().__init__()
        self.involution = Involution2D(7, strides=2, groups=4, padding="same")
        self.up = InvolutionUpSampling2D(2)

    def call(self, x: keras.KerasTensor, training: bool = False) -> object:
        return self.up(self.involution(x, training=training))


def layers() -> None:
    Involution(3, 1, 3, 1, 2)
    Involution1D(5, padding="causal")
    Involution1DTranspose(3, strides=2)
    Involution3D(kernel_size=(3, 3, 3), kernel_generator="static")
    layer = Involution2D(3, kernel_generator=kernel_generators.PairwiseAttention())
    layer(np.zeros((1, 8, 8, 4), "float32"))
    print(layer.get_config()["kernel_size"], layer.chosen_implementation)


def operator(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    y = ops.involution(x, kernel, kernel_size=3, strides=2, groups=4)
    with ops.force_implementation("taps"):
        ops.window_products(x, x, kernel_size=3)
    names = [name for name, reason in ops.implementations(x, kernel, 3) if reason is None]
    print(names, compat.carafe(x, kernel, 5, 1, 2))
    z: torch.Tensor = y
    return z


def modules() -> torch.nn.Module:
    torch.nn.Sequential(Involution2d(64, stride=2), Involution1d(8, 3))
    functional.involution(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 9, 8, 8), 3)
    generators.near_depthwise_(Involution2d(8, kernel_generator="linear"))
    network: torch.nn.Module = rednet26()
    return network


def networks(folder: pathlib.Path) -> keras.Model:
    model = models.rednet_tiny((32, 32, 3), classes=10)
    models.count_multiply_adds(model)
    models.conv_counterpart(models.inn(kernel_size=5))
    models.RedNet26((64, 64, 3), feature_maps=True)
    models.LSNetT(classes=5)
    models.cnn(filters=(8, 16, 16))
    model = models.fold(models.load("rednet_tiny-cifar10"))
    weights.save(folder, "rednet_tiny", {"input_shape": (32, 32, 3)}, model)
    for line in convert(folder / "rednet50.pth", folder / "rednet50").lines:
        print(line)
    result = export(model, folder / "model.onnx")
    print(result.path, result.error)
    hub.save("runs/digits", "inn", folder)
    hub.load("me/my-rednet", hub.push(folder, "me/my-rednet"))
    print(involution.onnx.library_path())
    return weights.load(folder)


def run(folder: pathlib.Path) -> float:
    digits = data.load("digits")
    x = data.to_unit_float(digits.x_test[:10])
    run = experiment.compare(experiment.Config(models="inn", dataset="digits", epochs=1), folder)
    accuracy: float = run.results[0].rows[-1]["test_accuracy"]
    classifier: Classifier = load_classifier(folder / run.results[0].file)
    try:
        print(classifier.predict_proba(x).argmax(axis=-1))
    except InputError as error:
        print(error)
    for name, record in visualize.capture(classifier.model, x).items():
        print(name, record.heat_map.shape)
    maps = visualize.kernel_maps(classifier.model, x)
    visualize.heat_maps(x, maps).savefig(folder / "maps.png")
    return accuracy
