"""The one error of all readers."""

from involution.utils.errors import InputError


class CheckpointError(InputError):
    """A checkpoint cannot be read or is not of a kind that is known."""
