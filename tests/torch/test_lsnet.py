"""LSNet's modules against an independent PyTorch network, whose state dict they load."""

import pytest
import torch

from involution.torch import Involution1d, Involution2d, generators, lsnet_b, lsnet_s, lsnet_t
from tests.support import lsnet_torch

pytestmark = pytest.mark.any_backend

NETWORKS = {"lsnet_t": lsnet_t, "lsnet_s": lsnet_s, "lsnet_b": lsnet_b}


@pytest.mark.long
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(
    "name", ["lsnet_t", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lsnet_s", "lsnet_b"))]
)
def test_outputs_and_gradients_match(name, distilled):
    theirs = lsnet_torch.network(name, distilled=distilled)
    ours = NETWORKS[name](7, distilled=distilled, dtype=torch.float64).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 224, 224, dtype=torch.float64)
    results = []
    for network in theirs, ours:
        network.zero_grad()
        y = network(images)
        y.square().sum().backward()
        results.append((y, {k: p.grad for k, p in network.named_parameters()}))
    (want, gradients), (got, ours_gradients) = results
    assert (got - want).abs().max() < 1e-9 * want.abs().max()
    assert gradients.keys() == ours_gradients.keys()
    for key, gradient in gradients.items():
        error = (ours_gradients[key] - gradient).abs().max()
        assert error < 1e-7 * gradient.abs().max() + 1e-12, key


@pytest.mark.long
def test_feature_maps_of_odd_sizes():
    maps = lsnet_t(5).eval().feature_maps(torch.rand(1, 3, 65, 97))
    assert [tuple(m.shape) for m in maps] == [
        (1, 64, 9, 13),
        (1, 128, 5, 7),
        (1, 256, 3, 4),
        (1, 384, 2, 2),
    ]


@pytest.mark.parametrize("rank", [1, 2])
def test_the_generator_normalizes_by_group(rank):
    make = {1: Involution1d, 2: Involution2d}[rank]
    layer = make(16, 3, stride=2, groups=2, kernel_generator="large_context")
    kernels = layer.kernel_generator(torch.randn(4, 16, *(9, 7)[:rank])).detach()
    grouped = kernels.reshape(4, 2, -1)
    assert grouped.mean(-1).abs().max() < 1e-5
    assert grouped.var(-1, unbiased=False) == pytest.approx(1, abs=1e-3)
    assert layer(torch.randn(4, 16, *(9, 7)[:rank])).shape[2:] == (5, 4)[:rank]


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="Received: padding='causal'"):
        Involution1d(16, 3, padding="causal", kernel_generator="large_context")
    with pytest.raises(ValueError, match="at least one hidden channel"):
        Involution2d(
            4,
            3,
            groups=1,
            kernel_generator=lambda c, w: generators.LargeContext(c, w, reduction_ratio=5),
        )
