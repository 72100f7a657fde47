"""Export to ONNX, TensorFlow's SavedModel and PyTorch's PT2, verified by running the file."""

from involution.export.api import BATCHES, FORMATS, LIMIT, Exported, ExportError, export

__all__ = ["BATCHES", "FORMATS", "LIMIT", "ExportError", "Exported", "export"]
