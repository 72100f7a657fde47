"""Errors of an export, and the handling of those of third-party exporters and runtimes."""

import contextlib
import warnings

from involution.utils.errors import InputError, one_line, out_of_memory_reason


class ExportError(InputError):
    """No file was written: the exporter failed, or the file's outputs differ from the model's."""


@contextlib.contextmanager
def ignore_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def as_export_error(message):
    """Suppresses the warnings of third-party code; its exceptions become an ``ExportError``."""
    try:
        with ignore_warnings():
            yield
    except ExportError:
        raise
    except Exception as error:  # exporters and runtimes document no exception types
        if out_of_memory_reason(error) is not None:
            raise
        raise ExportError(
            f"{message}. Received: {type(error).__name__}: {one_line(error)}"
        ) from error
