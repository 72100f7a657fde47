import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

if os.environ.get("KERAS_BACKEND") == "jax":
    import jax

    # The oracle is in float64, and so are the finite differences.
    jax.config.update("jax_enable_x64", True)

import involution  # noqa: F401 - settles the backend before a test imports Keras
