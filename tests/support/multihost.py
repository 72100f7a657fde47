"""Kills one of two hosts, and checks that the resumed run gives the same result.

    python -m tests.support.multihost --kills 10

kills one of two processes ten times, each at a random time after the first checkpoint. The other
must exit within a minute, with a one-line error. The run is resumed with two hosts and with one
alternately, and its final weights and losses must equal those of an uninterrupted run to 1e-5. All
values are float64, so that the order of sums does not matter. JAX only.
"""

import argparse
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import time

# 1,200 training images: divisible by two hosts.
OPTIONS = (
    "--dataset digits --recipe one-cycle --batch-size 64 --epochs 2 --validation-images 237 "
    "--checkpoint-every 5 --backend jax"
)
COMMAND = ("train", "--model", f"{__file__}:network", *OPTIONS.split())
EXIT_TIMEOUT = 60


def network(input_shape, classes):
    """A model without batch normalization: on CPUs, XLA's square root rounds differently for each
    shape, by 1e-7 in every dtype, so that the runs would diverge."""
    import keras

    from involution import Involution2D, kernel_generators

    layers, linear = keras.layers, kernel_generators.Linear
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Conv2D(8, 3, strides=2, activation="relu"),
            Involution2D(3, groups=2, kernel_generator=linear()),
            layers.ReLU(),
            Involution2D(5, strides=2, kernel_generator=linear(), implementation="native"),
            layers.Flatten(),
            layers.Dropout(0.2),
            layers.Dense(classes),
        ]
    )


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(output, count, log):
    """The processes of a run, whose output goes to files."""
    command = [
        sys.executable,
        "-m",
        "tests.support.multihost",
        "child",
        *COMMAND,
        "--output",
        str(output),
    ]
    command.append("--resume")
    if count > 1:
        command += [
            "--coordinator-address",
            f"127.0.0.1:{free_port()}",
            "--num-processes",
            str(count),
        ]
    processes = []
    for host in range(count):
        with open(f"{log}-{host}.txt", "w", encoding="utf-8") as file:
            processes.append(
                subprocess.Popen(
                    [*command, "--process-id", str(host)],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes


def wait_for_checkpoint(output, processes):
    while not list(output.glob("checkpoints/*.safetensors")):
        if any(process.poll() is not None for process in processes):
            raise SystemExit("A run must reach its first checkpoint.")
        time.sleep(0.05)
    return time.monotonic()


def read(log, host) -> str:
    return pathlib.Path(f"{log}-{host}.txt").read_text(encoding="utf-8")


def finish(output, count, log) -> float:
    """Seconds from the first checkpoint to the end of the last epoch."""
    processes = start(output, count, log)
    begin = wait_for_checkpoint(output, processes)
    while "epoch 2/2" not in read(log, 0) and processes[0].poll() is None:
        time.sleep(0.05)
    seconds = time.monotonic() - begin
    for host, process in enumerate(processes):
        if process.wait(600):
            raise SystemExit(f"Host {host} of {count} must finish:\n{read(log, host)}")
    return seconds


def result(output):
    """(weights, losses) of a run."""
    from involution.saving import classifier

    (file,) = output.glob("*.keras")
    model = classifier.load_model(file)
    history = (output / "history.csv").read_text(encoding="utf-8").splitlines()[1:]
    return model.get_weights(), [float(n) for row in history for n in row.split(",")[2:]]


def difference(one, other) -> float:
    import numpy as np

    pairs = [*zip(one[0], other[0], strict=True), (one[1], other[1])]
    return float(np.max([np.abs(np.subtract(a, b)).max() for a, b in pairs]))


def main(kills, seed):
    rng = random.Random(seed)  # noqa: S311 - no secret
    worst = slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="hosts-") as name:
        folder = pathlib.Path(name)
        seconds = finish(folder / "uninterrupted", 2, folder / "uninterrupted")
        expected = result(folder / "uninterrupted")
        print(
            f"uninterrupted: {seconds:.1f} s of training, last losses {expected[1][-4:]}",
            flush=True,
        )
        for number in range(kills):
            output, log = folder / f"run{number}", folder / f"log{number}"
            victim, delay = rng.randrange(2), rng.uniform(0, 0.9) * seconds
            processes = start(output, 2, log)
            wait_for_checkpoint(output, processes)
            time.sleep(delay)
            processes[victim].kill()
            killed_at = time.monotonic()
            status = processes[1 - victim].wait(EXIT_TIMEOUT)
            exit_seconds = time.monotonic() - killed_at
            processes[victim].wait()
            time.sleep(1)  # for the watchdog's message
            last = (read(log, 1 - victim).splitlines() or [""])[-1]
            if status == 0 or "A host was lost" not in last:
                raise SystemExit(
                    f"Host {1 - victim} must exit with an error that a host was lost. Received: "
                    f"status {status}: {last}"
                )
            count = 1 + number % 2
            finish(output, count, f"{log}-resumed")
            resumed = read(f"{log}-resumed", 0)
            error = difference(result(output), expected)
            worst, slowest = max(worst, error), max(slowest, exit_seconds)
            start_lines = [line for line in resumed.splitlines() if "Resuming" in line] or [
                "restarted"
            ]
            print(
                f"host {victim} killed after {delay:.1f} s: the other exited {exit_seconds:.1f} s "
                f"later, status {status}: {last[:60]}...; resumed on {count} host(s): "
                f"{start_lines[0]}: difference {error:.1e}",
                flush=True,
            )
            if not error <= 1e-5:  # also for NaN
                raise SystemExit("The result must equal that of an uninterrupted run.")
    print(f"{kills} kills: the other exited within {slowest:.1f} s; max difference {worst:.1e}")


def child(arguments):
    import keras

    from involution.training import experiment

    # Keras computes losses in floatx.
    keras.config.set_floatx("float64")
    experiment.PRECISIONS["float32"] = "float64"
    import involution_cli

    sys.argv[1:] = arguments
    involution_cli.main()


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2:])
    else:
        os.environ |= {"KERAS_BACKEND": "jax", "JAX_ENABLE_X64": "1"}
        parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
        parser.add_argument("--kills", type=int, default=10)
        parser.add_argument("--seed", type=int, default=0)
        main(**vars(parser.parse_args()))
