"""Export to ONNX, TensorFlow's SavedModel and PyTorch's PT2, verified by running the file."""

from involution import renamed
from involution.export.api import FORMATS, Exported, export
from involution.export.errors import ExportError
from involution.export.verify import BATCHES, TOLERANCE

__all__ = ["BATCHES", "FORMATS", "TOLERANCE", "ExportError", "Exported", "export"]

__getattr__ = renamed.attributes(__name__, {"LIMIT": "TOLERANCE"})
