"""The domain of the custom operators, and the version of its operators."""

DOMAIN, VERSION = "involution", 1
