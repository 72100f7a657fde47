"""Models exported with ``operator="native"``: the operators for onnxruntime.

It imports neither Keras nor a framework, and not onnxruntime.
"""

import pathlib

from involution.ops.native import library
from involution.utils.errors import InputError


def library_path() -> pathlib.Path:
    """The library of custom operators, for onnxruntime's API in any language.

    It contains the operators ``Involution`` and ``FusedInvolution`` of the domain ``involution``,
    for CPUs, and finds the compiled kernels beside it: copy both files of this folder,
    ``libinvolution.so`` and ``libinvolution_onnxruntime.so`` (on Windows ``.dll``).

    Raises:
        InputError: The package was installed without it, with the reason.

    Example:

    >>> import involution.onnx
    >>> involution.onnx.library_path().stem
    'libinvolution_onnxruntime'
    """
    _, reason = library.core()
    file = None
    if reason is None:
        file, reason = library.binding("onnxruntime")
    if file is None:
        raise InputError(
            f"The operators for onnxruntime require the compiled kernels. Received: {reason}"
        )
    return file


def register(session_options) -> None:
    """Registers the operators with the options of a session, which then loads such models.

    Args:
        session_options: An ``onnxruntime.SessionOptions``. Its number of threads holds for the
            operators too.

    Raises:
        InputError: The package was installed without them, with the reason.

    Example:

    >>> import onnxruntime, involution.onnx
    >>> options = onnxruntime.SessionOptions()
    >>> involution.onnx.register(options)
    """
    session_options.register_custom_ops_library(str(library_path()))
