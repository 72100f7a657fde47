"""Readers of checkpoints from other projects. They need no framework, execute no code from a file,
and check sizes against the size of the file before they allocate memory."""

import dataclasses
import pathlib

import numpy as np

from involution.models.checkpoint_readers import paddle, pytorch, tensorflow
from involution.models.checkpoint_readers.errors import CheckpointError
from involution.utils.errors import out_of_memory_reason

__all__ = ["Checkpoint", "CheckpointError", "read"]

KINDS = (
    "a PyTorch .pth file, a PaddlePaddle .pdparams file, or the folder of a TensorFlow SavedModel"
)
BUNDLE = pathlib.Path("variables", "variables.index")
PYTORCH, PADDLE, TENSORFLOW = "PyTorch", "PaddlePaddle", "TensorFlow"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        kind: ``"PyTorch"``, ``"PaddlePaddle"`` or ``"TensorFlow"``.
        tensors: Arrays by their names in the file.
    """

    kind: str
    tensors: dict[str, np.ndarray]


def read(path) -> Checkpoint:
    """Reads a checkpoint; its format is detected by content.

    Args:
        path: A PyTorch file (``torch.save``, zip or legacy format), a PaddlePaddle file
            (``paddle.save``), or the folder of a TensorFlow SavedModel.

    Returns:
        A ``Checkpoint``. Tensors of PyTorch files are views of the mapped file.

    Raises:
        CheckpointError: The format is unknown, or the file is damaged or has objects other than
            arrays.
    """
    path = pathlib.Path(path)
    try:
        kind, tensors = _read(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error} (in {path})") from error
    except Exception as error:  # a damaged file raises many kinds
        if out_of_memory_reason(error) is not None:
            raise
        raise CheckpointError(
            "A checkpoint must be complete and well-formed. "
            f"Received: {path}: {type(error).__name__}: {ascii(str(error)[:200])[1:-1]}"
        ) from error
    if not tensors:
        raise CheckpointError(f"A checkpoint must contain tensors. Received: {path}, without any")
    return Checkpoint(kind, tensors)


def _read(path):
    if path.is_dir():
        if not (path / BUNDLE).is_file():
            raise CheckpointError(
                f"A checkpoint must be {KINDS}. Received: a folder without {BUNDLE}"
            )
        return TENSORFLOW, tensorflow.read(path / BUNDLE.with_suffix(""))
    with open(path, "rb") as file:
        start = file.read(len(pytorch.LEGACY_START))
        file.seek(0)
        if start.startswith(pytorch.ZIP_START):
            return PYTORCH, pytorch.read_zip(file)
        if start == pytorch.LEGACY_START:
            return PYTORCH, pytorch.read_legacy(file)
        if start.startswith(b"\x80"):
            return PADDLE, paddle.read(file)
    found = f"a file that begins with {start!r}" if start else "an empty file"
    raise CheckpointError(f"A checkpoint must be {KINDS}. Received: {found}")
