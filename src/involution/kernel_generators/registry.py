"""Kernel generators by name."""

import keras

from involution.kernel_generators.attention import PairwiseAttention
from involution.kernel_generators.base import KernelGenerator
from involution.kernel_generators.convolutional import Bottleneck, Contextual, Linear
from involution.kernel_generators.large_context import LargeContext
from involution.kernel_generators.low_rank import LowRank
from involution.kernel_generators.static import Static

GENERATORS: dict[str, type[KernelGenerator]] = {
    "bottleneck": Bottleneck,
    "contextual": Contextual,
    "large_context": LargeContext,
    "linear": Linear,
    "low_rank": LowRank,
    "pairwise_attention": PairwiseAttention,
    "static": Static,
}

# Those with hidden channels, in proportion to the features'.
REDUCING = (Bottleneck, LargeContext)


def get(identifier, reduction_ratio=None, dtype=None, initial=None, generators=GENERATORS):
    """A generator from its name, its configuration or itself; None means the first of
    ``generators``, by name.

    ``reduction_ratio``, ``dtype`` and ``initial`` (initializers such as those of
    ``near_depthwise_init``) apply only to generators created by name, and only where accepted.
    """
    if isinstance(identifier, dict):
        return keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, keras.layers.Layer):
        return identifier
    name = next(iter(generators)) if identifier is None else str(identifier).lower()
    if name not in generators:
        raise ValueError(
            f"`kernel_generator` must be a Keras layer or one of {', '.join(generators)}. "
            f"Received: kernel_generator={identifier!r}"
        )
    generator_class = generators[name]
    options = dict(initial or {}) if generator_class.accepts_initializers else {}
    if issubclass(generator_class, REDUCING) and reduction_ratio is not None:
        options["reduction_ratio"] = reduction_ratio
    return generator_class(dtype=dtype, name=name, **options)
