"""Export to PyTorch's PT2 format by ``torch.export``."""

import keras


def write(spec, path):
    # Not ``keras.Model.export``, which traces unknown sizes as 2, smaller than a window.
    import torch

    torch.export.save(exported_program(spec), path)


def exported_program(spec):
    """The ``torch.export.ExportedProgram`` of the model, with dynamic shapes."""
    import torch

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = spec.model.eval()

        def forward(self, *tensors):
            return spec.call(*tensors)

    # Batch 2: the exporter specializes sizes 0 and 1 to constants.
    samples = [
        keras.ops.ones(shape, input_spec.dtype)
        for input_spec, shape in zip(spec.specs, spec.shapes(2), strict=True)
    ]
    dynamic_shapes = [
        {axis: torch.export.Dim.DYNAMIC for axis, n in enumerate(input_spec.shape) if n is None}
        for input_spec in spec.specs
    ]
    program = torch.export.export(
        Module(), tuple(samples), dynamic_shapes=(tuple(dynamic_shapes),), strict=False
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains paths of this machine
    return program
