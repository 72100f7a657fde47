"""The one error that is the user's to mend."""


class InputError(ValueError):
    """What was given cannot be used: one line, the rule, then the value received."""
