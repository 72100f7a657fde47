"""Kills one of two hosts, and shows that what is left is gone on with to the same result.

    python -m tests.support.multihost --kills 10

kills one of two processes at so many random moments, from its first checkpoint on. The other must
end by itself, in one line, within a minute; the run is gone on with by two and by one in turn, and
in the end its weights must be those of a run that was left alone, to 1e-5. All in float64: what is
compared is what is trained, and not how sums are rounded. JAX alone.
"""

import argparse
import os
import pathlib
import random
import re
import socket
import subprocess
import sys
import tempfile
import time

# 1,200 images to train on: as many for two as for one.
TOLD = (
    "--dataset digits --recipe one-cycle --batch-size 64 --epochs 2 --validation 237 "
    "--checkpoint-every 5 --backend jax"
)
COMMAND = ("train", "--model", f"{__file__}:network", *TOLD.split())
WITHIN = 60


def network(input_shape, classes):
    """Without batch normalizations: XLA's square roots on CPUs, whatever their type, are rounded as
    the shapes in the program have it, by 1e-7, and from there on trainings part."""
    import keras

    from involution import Involution2D
    from involution.kernel_generators import generators

    layers, linear = keras.layers, generators.Linear
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
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def begin(output, count, log):
    """The processes of a run; each one's output goes to a file."""
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
        command += ["--coordinator", f"127.0.0.1:{free_port()}", "--num-hosts", str(count)]
    processes = []
    for host in range(count):
        with open(f"{log}-{host}.txt", "w", encoding="utf-8") as file:
            processes.append(
                subprocess.Popen(
                    [*command, "--host-id", str(host)],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes


def wait_for_checkpoint(output, processes):
    while not list(output.glob("checkpoints/*.safetensors")):
        if any(process.poll() is not None for process in processes):
            raise SystemExit("A run must come to its first checkpoint.")
        time.sleep(0.05)
    return time.monotonic()


def read(log, host) -> str:
    return pathlib.Path(f"{log}-{host}.txt").read_text(encoding="utf-8")


def finish(output, count, log) -> float:
    """Seconds from the first checkpoint to the end of the training; what follows is one's alone."""
    processes = begin(output, count, log)
    start = wait_for_checkpoint(output, processes)
    while "epoch 2/2" not in read(log, 0) and processes[0].poll() is None:
        time.sleep(0.05)
    seconds = time.monotonic() - start
    for host, process in enumerate(processes):
        if process.wait(600):
            raise SystemExit(f"Host {host} of {count} must come to its end:\n{read(log, host)}")
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
    return max(float(np.abs(np.subtract(a, b)).max()) for a, b in pairs)


def main(kills, seed):
    rng = random.Random(seed)  # noqa: S311 - no secret
    worst = slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="hosts-") as place:
        folder = pathlib.Path(place)
        seconds = finish(folder / "whole", 2, folder / "whole")
        expected = result(folder / "whole")
        print(
            f"left alone: {seconds:.1f} s of training, last losses {expected[1][-4:]}", flush=True
        )
        for number in range(kills):
            output, log = folder / f"run{number}", folder / f"log{number}"
            victim, moment = rng.randrange(2), rng.uniform(0, 0.9) * seconds
            processes = begin(output, 2, log)
            wait_for_checkpoint(output, processes)
            time.sleep(moment)
            processes[victim].kill()
            start = time.monotonic()
            other = processes[1 - victim].wait(WITHIN)
            ended = time.monotonic() - start
            processes[victim].wait()
            time.sleep(1)  # what is said last
            last = (read(log, 1 - victim).splitlines() or [""])[-1]
            if other == 0 or not re.search("a host was lost|one that was lost", last):
                raise SystemExit(f"Host {1 - victim} must say why it ended, {other}: {last}")
            count = 1 + number % 2
            finish(output, count, f"{log}-again")
            again = read(f"{log}-again", 0)
            found = difference(result(output), expected)
            worst, slowest = max(worst, found), max(slowest, ended)
            from_where = [line for line in again.splitlines() if "Going on" in line] or ["anew"]
            print(
                f"host {victim} killed after {moment:.1f} s: the other ended {ended:.1f} s later, "
                f"{other}: {last[:60]}...; {count} host(s): {from_where[0]}: {found:.1e}",
                flush=True,
            )
            if found > 1e-5:
                raise SystemExit("The result must be that of a run that was left alone.")
    print(f"{kills} kills: the other ended within {slowest:.1f} s; largest difference {worst:.1e}")


def child(arguments):
    import keras

    from involution.training import experiment

    # Losses too.
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
