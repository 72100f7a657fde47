"""Candidates that onnxruntime runs: the operator with generated kernels, exported in both forms."""

import pathlib
import tempfile
from collections.abc import Callable

import keras
import numpy as np

import involution.onnx
from involution.ops import fused_involution
from involution.ops.native.library import available_cpus

# Candidates, with the argument ``operator`` of ``export``.
OPERATORS = {"onnx-portable": "portable", "onnx-native": "native"}


@keras.saving.register_keras_serializable(package="involution")
class _Generated(keras.layers.Layer):
    """``fused_involution`` as a layer of two inputs; its weight and bias are the layer's."""

    def __init__(self, case_arguments, **kwargs):
        super().__init__(**kwargs)
        self.case_arguments = case_arguments

    def build(self, x_shape, hidden_shape):
        window = self.case_arguments
        columns = int(np.prod(window["kernel_size"])) * window["groups"]
        self.kernel = self.add_weight(shape=(hidden_shape[-1], columns))
        self.bias = self.add_weight(shape=(columns,))

    def call(self, x, hidden):
        return fused_involution(x, hidden, self.kernel, self.bias, **self.case_arguments)


def session_call(case, operator, arguments) -> Callable[[], np.ndarray]:
    """A function that runs the exported call, on as many threads as CPUs.

    Raises:
        NotImplementedError: A package or the operator is missing, with the reason.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise NotImplementedError(f"requires the package {error.name}") from error
    from involution.export import export

    x, hidden, weight, bias = (keras.ops.convert_to_numpy(a) for a in arguments)
    inputs = [keras.Input(a.shape[1:], name=name) for name, a in (("x", x), ("hidden", hidden))]
    layer = _Generated(case.arguments)
    model = keras.Model(inputs, layer(*inputs))
    layer.set_weights([weight, bias])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cpus()
    # Waiting threads would take the CPUs of the other candidates.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = export(model, pathlib.Path(folder, "case.onnx"), operator=operator).path
        except ValueError as error:  # an extra or the operator is missing
            raise NotImplementedError(str(error)) from error
        if operator == "native":
            involution.onnx.register(options)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {"x": x, "hidden": hidden}
    return lambda: session.run(None, feeds)[0]
