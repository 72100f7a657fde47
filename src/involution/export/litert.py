"""Export to LiteRT (.tflite), formerly TensorFlow Lite, by TensorFlow's converter."""

import tempfile

from involution.export import saved_model


def write(spec, path):
    import tensorflow as tf

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        saved_model.write(spec, folder)
        # Of LiteRT's own operations only: others would require TensorFlow at run time.
        content = tf.lite.TFLiteConverter.from_saved_model(folder).convert()
    path.write_bytes(content)
