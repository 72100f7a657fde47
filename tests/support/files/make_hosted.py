"""Makes hosted/ and hosted.npz: a stand-in for the SavedModel keras-io/involution, written by
Keras 2 itself, and what that model gives. Needs `pip install tensorflow tf_keras`."""

import pathlib
import shutil
import tempfile

import numpy as np
import tensorflow as tf
import tf_keras as keras

HERE = pathlib.Path(__file__).parent


class Involution(keras.layers.Layer):
    """A 3x3 involution with one group that returns (output, kernel), with the attribute that the
    hosted model's layers have."""

    def build(self, shape):
        self.kernel_gen = keras.Sequential(
            [
                keras.layers.Conv2D(1, 1),
                keras.layers.BatchNormalization(),
                keras.layers.ReLU(),
                keras.layers.Conv2D(9, 1),
            ]
        )

    def call(self, x):
        kernel = self.kernel_gen(x)[..., None]
        seen = tf.image.extract_patches(x, [1, 3, 3, 1], [1] * 4, [1] * 4, "SAME")
        seen = tf.reshape(seen, (-1, *x.shape[1:3], 9, 3))
        return tf.reduce_sum(kernel * seen, axis=3), kernel[..., None]


x = inputs = keras.Input((8, 8, 3))
kernels = []
for i in (1, 2, 3):
    x, kernel = Involution(name=f"inv_{i}")(x)
    kernels.append(kernel)
    x = keras.layers.MaxPooling2D(2)(keras.layers.ReLU()(x))
model = keras.Model(inputs, kernels)

rng = np.random.default_rng(0)
for variable in model.variables:
    values = rng.normal(size=variable.shape)
    variable.assign(np.abs(values) + 0.5 if "variance" in variable.name else values)

images = rng.random((2, 8, 8, 3), dtype="float32")
outputs = [np.array(y) for y in model(images)]
np.savez_compressed(HERE / "hosted.npz", images, *outputs)
with tempfile.TemporaryDirectory() as folder:
    model.save(folder)
    shutil.rmtree(HERE / "hosted", ignore_errors=True)
    shutil.copytree(pathlib.Path(folder, "variables"), HERE / "hosted" / "variables")
