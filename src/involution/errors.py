"""The errors that are not ours: each is one line, the rule, then the value received."""


class InputError(ValueError):
    """What was given cannot be used."""


class WriteError(OSError):
    """A file could not be written; what was in its place before is there as it was."""

    def __str__(self):
        return f"A file must be written whole. Received: {self.filename}: {self.strerror}"
