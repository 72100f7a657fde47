"""What a training step costs on several processes: computing, adding up gradients and statistics
over all of them, and the step; and the step as a model of these two predicts it.

    python benchmarks/scaling.py --processes 1,2,4 --output FILE.csv

JAX on this machine's processors, one for each process (with more processes than processors they
share). Each process trains on the same number of images:

    compute     a step that nothing is added up in, all processes at work at once
    all-reduce  one sum over all processes, of some sizes, repeated: latency and bandwidth
    step        the step of all together
    predicted   compute + sums x latency + bytes / bandwidth; sums and bytes as compiled
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time

SIZES = (256, 2**14, 2**18, 2**22)  # numbers of 4 bytes
REPEATS = 20
BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2, "f16": 2, "f64": 8}


def median_seconds(run, repeats=REPEATS):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def sums(size):
    """A function that adds up so many numbers over all processes."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("batch",))
    spread = NamedSharding(mesh, PartitionSpec("batch"))
    own = jax.device_put(np.ones((1, size), "float32"), jax.local_devices()[0])
    shape = (len(jax.devices()), size)
    array = jax.make_array_from_single_device_arrays(shape, spread, [own])
    whole = NamedSharding(mesh, PartitionSpec())
    program = jax.jit(lambda x: x.sum(0), out_shardings=whole)
    return lambda: jax.block_until_ready(program(array))


def child(host, hosts, port, model, side, batch, dump):
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[host % os.cpu_count()]})
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={dump} --xla_dump_hlo_as_text"
    from involution import cluster, data, experiment, memory, model_labels, training

    memory.keep_freed()
    together = cluster.of(1, f"127.0.0.1:{port}", hosts, host)
    cluster.begin(together)
    import numpy as np

    count = batch * hosts
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (count, side, side, 3)).astype("uint8")
    y = random.integers(0, 10, count)
    names = tuple("0123456789")
    dataset = data.Dataset("noise", "", x, y, x[:hosts], y[:hosts], names)
    recipe = dataclasses.replace(
        training.RECIPES["imagenet"], crop=False, flip=False, learning_rate=1e-3
    )
    ((label, builder),) = model_labels.parse(model).items()
    found = {}
    for name, who, images in (("compute", cluster.ALONE, batch), ("step", together, count)):
        network = experiment.build(label, builder, dataset, experiment.Config(models=model))
        asked = dataclasses.replace(recipe, batch_size=images)
        trainer = training.Trainer(network, dataset, asked, 1000, 0, who)
        order = np.arange(images)
        for _ in range(3):
            trainer.train(order)
        together.wait_for_all(name)
        found[name] = median_seconds(lambda trainer=trainer, order=order: trainer.train(order))
        together.wait_for_all(f"{name} is measured")
    found["sums"] = dict.fromkeys(SIZES, 0.0)
    if hosts > 1:
        for size in SIZES:
            run = sums(size)
            for _ in range(5):
                run()
            found["sums"][size] = median_seconds(run, 100)
    together.end()
    print(json.dumps(found))


def collectives(dump) -> tuple[int, int, list[str]]:
    """(sums over all processes, their bytes, other collectives) of the step as compiled."""
    texts = [f.read_text() for f in pathlib.Path(dump).glob("*after_optimizations.txt")]
    best = max(texts, key=lambda text: text.count(" all-reduce("), default="")
    total = 0
    found = re.findall(r"= (.*?) all-reduce\(", best)
    for shapes in found:
        for kind, sides in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            size = 1
            for n in filter(None, sides.split(",")):
                size *= int(n)
            total += size * BYTES.get(kind, 4)
    others = re.findall(r" (all-gather|all-to-all|collective-permute|reduce-scatter)\(", best)
    return len(found), total, others


def measured(hosts, given) -> dict:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with tempfile.TemporaryDirectory() as place:
        processes = [
            subprocess.Popen(  # noqa: S603 - our own
                [
                    *(sys.executable, __file__, "child", str(host), str(hosts), str(port)),
                    *(given.model, str(given.side), str(given.batch), f"{place}/{host}"),
                ],
                env={**os.environ, "KERAS_BACKEND": "jax"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for host in range(hosts)
        ]
        told = [json.loads(p.communicate()[0].splitlines()[-1]) for p in processes]
        count, size, others = collectives(f"{place}/0") if hosts > 1 else (0, 0, [])
    if others:
        raise SystemExit(f"A step must add up alone; it has {others}")
    compute, step = (max(one[name] for one in told) for name in ("compute", "step"))
    latency, per_byte = fit({int(n): s for n, s in told[0]["sums"].items()}) if count else (0, 0)
    predicted = compute + count * latency + size * per_byte
    return {
        "processes": hosts,
        "model": given.model,
        "side": given.side,
        "images_per_process": given.batch,
        "images_per_second": round(given.batch * hosts / step, 2),
        "compute_ms": round(1e3 * compute, 1),
        "sums": count,
        "megabytes": round(size / 1e6, 2),
        "latency_us": round(1e6 * latency),
        "megabytes_per_second": round(1e-6 / per_byte) if per_byte else "",
        "predicted_ms": round(1e3 * predicted, 1),
        "step_ms": round(1e3 * step, 1),
    }


def fit(seconds) -> tuple[float, float]:
    """(seconds of a sum, seconds of a byte) from the smallest and the largest."""
    (small, short), *_, (large, long) = sorted(seconds.items())
    per_byte = (long - short) / (4 * (large - small))
    return short, per_byte


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--model", default="rednet26")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="images of a process")
    parser.add_argument("--output")
    given = parser.parse_args()
    rows = []
    for hosts in map(int, given.processes.split(",")):
        rows.append(measured(hosts, given))
        print(rows[-1], flush=True)
    if given.output:
        from involution import files

        files.write_text(given.output, files.csv_text(rows[0], rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*(int(a) if a.isdecimal() else a for a in sys.argv[2:]))
    else:
        main()
