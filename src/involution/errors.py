"""The errors that are not ours: each is one line, the rule, then the value received."""


class InputError(ValueError):
    """What was given cannot be used."""


class WriteError(OSError):
    """A file could not be written; what was in its place before is there as it was."""

    def __str__(self):
        return f"A file must be written whole. Received: {self.filename}: {self.strerror}"


# What frameworks say then: TensorFlow and JAX, PyTorch on CPUs, on CUDA devices.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "allocate memory", "out of memory", "OOM when allocating")


def out_of_memory(error) -> str | None:
    """The line of an error that tells that memory did not suffice; None: it is another error."""
    lines = (n for n in str(error).splitlines() if any(said in n for said in OUT_OF_MEMORY))
    found = next(lines, None)
    if found is None and isinstance(error, MemoryError):
        found = str(error) or "MemoryError"
    return found and found[:200]
