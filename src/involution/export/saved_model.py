"""Export to TensorFlow's SavedModel."""

import keras


def write(spec, path):
    # Not ``keras.Model.export``, which uses this API but rejects nested outputs.
    archive = keras.export.ExportArchive()
    archive.track(spec.model)
    archive.add_endpoint("serve", *function_and_signature(spec))
    archive.write_out(str(path), verbose=False)


def function_and_signature(spec):
    """The arguments of ``tf.function``: the function to trace and its input signature."""
    import tensorflow as tf

    signature = [
        tf.TensorSpec(input_spec.shape, input_spec.dtype, name=name)
        for input_spec, name in zip(spec.specs, spec.inputs, strict=True)
    ]
    # A new function: the model's may have been traced with another implementation.
    return lambda *tensors: spec.call(*tensors), signature
