"""Kernels with the groups before the taps, for channels on axis 1."""

from involution.ops.frameworks import namespace


def by_groups(function, x, kernel, groups, kernel_size, **arguments):
    """A function of ``involution.ops``, with contiguous groups folded into the batch.

    The memory order of both tensors remains: none is copied.

    Args:
        x: Tensor (N, C, *spatial).
        kernel: Tensor (N, groups, taps, *kernel_spatial), or (N, groups * taps, *kernel_spatial).
    """
    array = namespace(x)
    batch, _, *sizes = array.shape(x)
    rank, taps = len(sizes), kernel_size ** len(sizes)
    folded = array.reshape(x, (batch * groups, x.shape[1] // groups, *sizes))
    kernel_sizes = array.shape(kernel)[-rank:]
    kernel = array.reshape(kernel, (batch * groups, taps, 1, *kernel_sizes))
    y = function(folded, kernel, kernel_size, data_format="channels_first", **arguments)
    return array.reshape(y, (batch, x.shape[1], *array.shape(y)[2:]))
