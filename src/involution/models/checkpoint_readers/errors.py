"""The error of all readers."""

from involution.utils.errors import InputError


class CheckpointError(InputError):
    """A checkpoint is damaged, of an unknown format or unsupported."""
