"""Time of a data-parallel training step on several processes, and its prediction from the times of
computation and of the all-reduce operations.

    python benchmarks/scaling.py --processes 1,2,4 --output FILE.csv

JAX on this machine's CPUs; each process computes in one thread and trains on the same number of
images:

    compute     a step without all-reduce, in all processes at the same time
    sums        the all-reduce operations of the compiled step in sequence
    step        the data-parallel step
    predicted   compute + sums
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time

REPEATS = 20


def median_seconds(run, repeats=REPEATS):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def all_reduces(sizes):
    """A program with an all-reduce of each size, in sequence."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("batch",))
    sharded = PartitionSpec("batch")

    def all_reduce(*arrays):
        results = []
        for x in arrays:
            # Depends on the previous operation, so that they run in sequence.
            dependency = results[-1][0, 0] * 1e-9 if results else 0.0
            results.append(jax.lax.psum(x + dependency, "batch"))
        return results

    arrays = [
        jax.make_array_from_single_device_arrays(
            (len(jax.devices()), size),
            NamedSharding(mesh, sharded),
            [jax.device_put(np.ones((1, size), "float32"), jax.local_devices()[0])],
        )
        for size in sizes
    ]
    program = jax.jit(
        jax.shard_map(all_reduce, mesh=mesh, in_specs=sharded, out_specs=sharded, check_vma=False)
    )
    return lambda: jax.block_until_ready(program(*arrays))


def child(host, hosts, port, model, side, batch, dump):
    # One compute thread without CPU affinity: communication threads that are pinned to its CPU
    # would wait for 4 ms each time.
    os.environ["NPROC"] = os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={dump} --xla_dump_hlo_as_text"
    from involution.data import datasets
    from involution.models import specs
    from involution.training import distributed, experiment
    from involution.training.recipes import RECIPES
    from involution.training.trainer import Trainer
    from involution.utils import memory

    memory.disable_malloc_trim()
    distribution = distributed.from_environment(1, f"127.0.0.1:{port}", hosts, host)
    distributed.initialize(distribution)
    import numpy as np

    count = batch * hosts
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (count, side, side, 3)).astype("uint8")
    y = random.integers(0, 10, count)
    names = tuple("0123456789")
    dataset = datasets.Dataset("noise", "", x, y, x[:hosts], y[:hosts], names)
    recipe = dataclasses.replace(
        RECIPES["imagenet"], random_crop=False, random_flip=False, learning_rate=1e-3
    )
    ((label, builder),) = specs.parse(model).items()
    found = {}
    for name, devices, images in (
        ("compute", distributed.SINGLE_PROCESS, batch),
        ("step", distribution, count),
    ):
        network = experiment.build(label, builder, dataset, experiment.Config(models=model))
        trainer_recipe = dataclasses.replace(recipe, batch_size=images)
        trainer = Trainer(network, dataset, trainer_recipe, 1000, 0, devices)
        order = np.arange(images)
        for _ in range(3):
            trainer.train(order)
        distribution.barrier(name)
        found[name] = median_seconds(lambda trainer=trainer, order=order: trainer.train(order))
        distribution.barrier(f"{name} is measured")
    found["sizes"] = sizes = all_reduce_sizes(dump) if hosts > 1 else []
    if sizes:
        run = all_reduces(sizes)
        for _ in range(3):
            run()
        found["sums"] = median_seconds(run)
    distribution.shutdown()
    print(json.dumps(found))


def all_reduce_sizes(dump) -> list[int]:
    """Number of elements of each all-reduce in the compiled step."""
    texts = [f.read_text() for f in pathlib.Path(dump).glob("*after_optimizations.txt")]
    step = max(texts, key=lambda text: text.count(" all-reduce("))
    others = re.findall(r" (all-gather|all-to-all|collective-permute|reduce-scatter)\(", step)
    if others:
        raise SystemExit(f"The step may only have all-reduce collectives. Received: {others}")
    return [
        math.prod(int(n) for n in shape.split(",") if n)
        for shapes in re.findall(r"= (.*?) all-reduce\(", step)
        for _, shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    ]


def measured(hosts, options) -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(  # noqa: S603 - this file
                [
                    *(sys.executable, __file__, "child", str(host), str(hosts), str(port)),
                    *(options.model, str(options.side), str(options.batch), f"{folder}/{host}"),
                ],
                env={**os.environ, "KERAS_BACKEND": "jax"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for host in range(hosts)
        ]
        outputs = [json.loads(p.communicate()[0].splitlines()[-1]) for p in processes]
    compute, step, sums = (
        max(output.get(n, 0.0) for output in outputs) for n in ("compute", "step", "sums")
    )
    sizes = outputs[0]["sizes"]
    return {
        "processes": hosts,
        "model": options.model,
        "side": options.side,
        "images_per_process": options.batch,
        "images_per_second": round(options.batch * hosts / step, 2),
        "tensors_added": len(sizes),
        "megabytes": round(4e-6 * sum(sizes), 2),
        "compute_ms": round(1e3 * compute, 1),
        "sums_ms": round(1e3 * sums, 1),
        "predicted_ms": round(1e3 * (compute + sums), 1),
        "step_ms": round(1e3 * step, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--model", default="rednet26")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="images per process")
    parser.add_argument("--output")
    options = parser.parse_args()
    rows = []
    for hosts in map(int, options.processes.split(",")):
        rows.append(measured(hosts, options))
        print(rows[-1], flush=True)
    if options.output:
        from involution.utils import atomic_files

        atomic_files.write_text(options.output, atomic_files.csv_text(rows[0], rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*(int(a) if a.isdecimal() else a for a in sys.argv[2:]))
    else:
        main()
