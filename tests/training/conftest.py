import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def freeze_objects():
    """As at the end of the collection: what earlier modules have left is not searched again."""
    gc.collect()
    gc.freeze()
