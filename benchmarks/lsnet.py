"""Images a second of LSNet, RedNet-26 and MobileNetV3 on this machine's CPUs, in inference.

All networks run alternately, one batch each; medians.

    KERAS_BACKEND=tensorflow python benchmarks/lsnet.py --batches 1,8 --steps 20
"""

import argparse
import statistics
import time

import keras
import numpy as np

from involution import models
from involution.ops.native.library import available_cpus

NETWORKS = {
    "lsnet_t": models.LSNetT,
    "lsnet_s": models.LSNetS,
    "rednet26": models.RedNet26,
    "mobilenet_v3_large": lambda shape: keras.applications.MobileNetV3Large(
        input_shape=shape, weights=None, classifier_activation=None
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    backend = keras.config.backend()
    print(f"{backend}, Keras {keras.__version__}, {available_cpus()} threads", flush=True)
    networks = {name: make((options.side, options.side, 3)) for name, make in NETWORKS.items()}
    for network in networks.values():
        network.compile(jit_compile=backend == "jax")
    for batch in map(int, options.batches.split(",")):
        times = {name: [] for name in networks}
        for step in range(options.steps + 2):
            shape = (batch, options.side, options.side, 3)
            x = np.random.default_rng(step).random(shape, "float32")
            for name, network in networks.items():
                started = time.perf_counter()
                network.predict_on_batch(x)
                if step >= 2:
                    times[name].append(time.perf_counter() - started)
        for name, values in times.items():
            median = statistics.median(values)
            print(
                f"batch {batch}  {name:20}{batch / median:8.1f} images/s  {1e3 * median:8.1f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
