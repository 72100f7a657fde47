"""Self-attention of all positions of a map, with a learned bias by offset."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="involution")
class OffsetAttention(keras.layers.Layer):
    """Attention between all positions, from maps of queries, keys and values, channels last.

    The score of two positions is the scaled product of query and key plus a bias of their absolute
    vertical and horizontal offsets. The table of biases belongs to maps of ``table_size``; for maps
    of other sizes it is interpolated linearly, with its ends at the largest offsets.

    Args:
        heads: Number of heads; divides the channels of queries and values.
        table_size: Side of the table of offsets.
        **kwargs: As for ``keras.layers.Layer``.

    Call arguments:
        inputs: Queries and keys (B, H, W, heads * key channels), values (B, H, W, C).

    Returns:
        Tensor (B, H, W, C).

    Raises:
        ValueError: The maps have different sizes, or ``heads`` does not divide their channels.

    Source: Wang et al., arXiv:2503.23135; the biases: Graham et al., "LeViT", arXiv:2104.01136.

    Example:

    >>> import numpy as np, involution
    >>> layer = involution.layers.OffsetAttention(heads=2, table_size=4)
    >>> maps = [np.ones((1, 5, 4, n), "float32") for n in (8, 8, 6)]
    >>> tuple(layer(maps).shape)
    (1, 5, 4, 6)
    """

    def __init__(self, heads, table_size, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.table_size = heads, table_size

    def build(self, input_shape):
        queries, keys, values = (tuple(shape) for shape in input_shape)
        if queries != keys or queries[:-1] != values[:-1] or len(queries) != 4:
            raise ValueError(
                "Queries, keys and values must be maps of equal sizes (B, H, W, channels). "
                f"Received: {queries}, {keys}, {values}"
            )
        if queries[-1] % self.heads or values[-1] % self.heads:
            raise ValueError(
                "`heads` must divide the channels. "
                f"Received: heads={self.heads}, {queries}, {values}"
            )
        self.biases = self.add_weight(
            shape=(self.heads, self.table_size**2), initializer="zeros", name="attention_biases"
        )

    def compute_output_shape(self, input_shape):
        return input_shape[-1]

    def call(self, inputs):
        queries, keys, values = inputs
        _, height, width, _ = ops.shape(values)

        def by_head(x):
            return ops.reshape(x, (-1, height * width, self.heads, x.shape[-1] // self.heads))

        queries, keys, v = (by_head(x) for x in inputs)
        scores = ops.einsum("bqhc,bkhc->bhqk", queries, keys) * queries.shape[-1] ** -0.5
        weights = ops.softmax(scores + self._bias(height, width), axis=-1)
        y = ops.einsum("bhqk,bkhc->bqhc", weights, v)
        return ops.reshape(y, (-1, height, width, values.shape[-1]))

    def _bias(self, height, width):
        """The biases (heads, H * W, H * W) of all pairs of positions."""
        table = ops.reshape(self.biases, (self.heads, self.table_size, self.table_size))
        rows, columns = (self._offset_weights(n) for n in (height, width))
        # By differences of rows and of columns.
        bias = ops.einsum("ijr,hrc,klc->hikjl", rows, table, columns)
        return ops.reshape(bias, (self.heads, height * width, height * width))

    def _offset_weights(self, size):
        """For all pairs of positions in a dimension, the weights (size, size, table_size) of the
        table's entries: 1 for one of them, or two neighbors that are interpolated."""
        positions = ops.cast(ops.arange(size), "float32")
        offsets = ops.abs(positions[:, None] - positions[None])
        last = ops.maximum(ops.cast(size, "float32") - 1, 1)
        scaled = offsets * ((self.table_size - 1) / last)
        entries = ops.arange(self.table_size, dtype="float32")
        weights = ops.relu(1 - ops.abs(scaled[..., None] - entries))
        return ops.cast(weights, self.compute_dtype)

    def count_multiply_adds(self, shapes) -> int:
        """Multiply-adds for inputs of these shapes."""
        (_, height, width, key_channels), _, (*_, channels) = shapes
        return (height * width) ** 2 * (key_channels + channels)

    def get_config(self):
        return {**super().get_config(), "heads": self.heads, "table_size": self.table_size}
