"""Kills runs, and checks that they resume to a bit-identical result.

    KERAS_BACKEND=jax python -m tests.support.kill_resume --kills 60

kills 60 processes at random times, and then one before each kind of file operation of a run. Each
run resumes; only steps after the last checkpoint may be lost or repeated, and the final
weights, history and list of files must equal those of an uninterrupted run.
"""

import argparse
import collections
import hashlib
import multiprocessing
import os
import pathlib
import random
import re
import signal
import sys
import tempfile
import time

CHECKPOINT_EVERY = 10  # steps between checkpoints
MODELS = "cnn:filters=4-4-4:hidden=8,cnn:filters=2-2-2:hidden=4"
OPERATIONS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
MAX_KILLS = 8  # kills of one run
# The server imports these modules once for all processes.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["involution.training.experiment", "involution.training.report", "sklearn.datasets"]
)


class Child:
    """The process to kill: a run that logs each step, and each file operation before it happens.

    Args:
        output: The run's folder.
        journal: The log file.
        fatal: "NAME N": the process kills itself before the N-th operation NAME; "": it does not.
    """

    def __init__(self, output, journal, fatal):
        self.output = os.path.abspath(output)
        self.journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.fatal, _, count = fatal.rpartition(" ")
        self.remaining = int(count or 0)

    def record(self, *words):
        os.write(self.journal, (" ".join(map(str, words)) + "\n").encode())

    def on_operation(self, operation, path):
        if not os.path.abspath(path).startswith(self.output):
            return
        name = re.sub(r"\d{12}-[0-9a-f]+", "checkpoint", os.path.relpath(path, self.output))
        name = f"{operation}:{re.sub(r'-[a-z0-9_]{8}(?=[.])', '', name)}"
        self.record("change", name)
        if name == self.fatal:
            self.remaining -= 1
            if self.remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event, arguments):
        if event in OPERATIONS:
            self.on_operation(event, os.fspath(arguments[0]))
        elif event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self.on_operation(event, os.fsdecode(arguments[0]))

    def main(self):
        from involution.training import checkpoint, experiment
        from involution.training.run_folder import history
        from involution.utils.progress import NullProgress

        progress, real_sync, real_save = NullProgress(), os.fsync, checkpoint.CheckpointManager.save

        def sync(handle):
            self.on_operation("fsync", os.readlink(f"/proc/self/fd/{handle}"))
            real_sync(handle)

        def save(store, arrays, state):
            saved = real_save(store, arrays, state)
            self.record("saved")
            return saved

        os.fsync, checkpoint.CheckpointManager.save = sync, save
        progress.begin = lambda label, total, done=0: self.record("start", done, label)
        progress.advance = lambda: self.record("step")
        sys.addaudithook(self.audit)
        self.record("begin")
        config = experiment.Config("digits", MODELS, epochs=2, recipe="one-cycle", batch_size=64)
        run = experiment.compare(
            config, self.output, progress, resume=True, checkpoint_every=CHECKPOINT_EVERY
        )
        digest = hashlib.sha256(history(run.results).encode())
        for result in run.results:
            for weight in result.classifier.model.get_weights():
                digest.update(weight.tobytes())
        self.record("end", digest.hexdigest(), *sorted(os.listdir(self.output)))


def train(*arguments):
    Child(*arguments).main()


class KilledRun:
    """A run that is killed and resumed until it finishes.

    Attributes:
        kills: Number of kills.
        seconds: Duration of its last process, without imports.
        lines: The log of its processes.
        lost: Maximum number of steps lost by a kill; ``CHECKPOINT_EVERY`` at most.
    """

    def __init__(self, folder):
        self.output, self.journal = folder / "run", folder / "journal"
        self.kills, self.seconds, self.lines, self.lost = 0, 0.0, [], 0

    def resume(self, fatal="", after=None) -> bool:
        """Whether the run finished; ``after``: seconds after which to kill it."""
        before = self._read()
        process = PROCESSES.Process(target=train, args=(self.output, self.journal, fatal))
        process.start()
        while process.is_alive() and len(self._read()) == len(before):
            time.sleep(0.01)
        start = time.perf_counter()
        process.join(after)
        process.kill()
        process.join()
        self.seconds = time.perf_counter() - start
        code = process.exitcode
        if code not in (0, -signal.SIGKILL):
            raise SystemExit(f"A resumed run must exit with status 0. Received: {code}")
        self.lines = self._read()
        self._check(before, self.lines[len(before) :])
        self.kills += code != 0
        return code == 0

    def _read(self) -> list[str]:
        text = self.journal.read_text() if self.journal.exists() else ""
        # A kill may truncate the last line.
        return text[: text.rfind("\n") + 1].splitlines()

    def _check(self, before, after):
        """Checks that no step before a checkpoint is lost or repeated."""
        start = next((line for line in after if line.startswith("start ")), None)
        if start is None:
            return
        done, label = start.split(" ")[1:]
        saved = steps = 0
        same_model = False
        for line in before:
            if line.startswith("start "):
                first_step, other_label = line.split(" ")[1:]
                same_model = other_label == label
                saved = steps = int(first_step) if same_model else 0
            elif same_model and line == "step":
                steps += 1
            elif same_model and line == "saved":
                saved = steps
        if not saved <= int(done) <= steps:
            raise SystemExit(
                f"A run must resume between its last checkpoint, step {saved}, and its last step, "
                f"{steps}. Received: {done}"
            )
        self.lost = max(self.lost, steps - int(done))


def log(text):
    print(text, flush=True)


def main(kills, seed):
    rng = random.Random(seed)  # noqa: S311 - no secret
    lost = total = 0
    with tempfile.TemporaryDirectory(prefix="crash-") as folder:

        def new() -> KilledRun:
            return KilledRun(pathlib.Path(tempfile.mkdtemp(dir=folder)))

        def check_result(run):
            nonlocal lost, total
            if run.lines[-1] != uninterrupted.lines[-1]:
                raise SystemExit(
                    f"A resumed run must have the result {uninterrupted.lines[-1]}. Received: "
                    f"{run.lines[-1]}"
                )
            lost, total = max(lost, run.lost), total + run.kills

        uninterrupted = new()
        uninterrupted.resume()
        lines = uninterrupted.lines
        changes = collections.Counter(
            line.removeprefix("change ") for line in lines if line.startswith("change ")
        )
        log(
            f"uninterrupted: {lines.count('step')} steps, {uninterrupted.seconds:.1f} s, "
            f"{changes.total()} file operations, of {len(changes)} kinds"
        )
        log(lines[-1])
        while total < kills:
            run = new()
            while run.kills < min(MAX_KILLS, kills - total):
                if run.resume(after=rng.uniform(0, uninterrupted.seconds)):
                    break
            else:
                run.resume()
            check_result(run)
            log(f"{total} kills at random times, at most {lost} steps lost")
        total = 0
        run = new()
        for kind, count in changes.items():
            # The first checkpoint is deleted after the third is written.
            for occurrence in range(1, min(count, 3) + 1):
                if run.resume(f"{kind} {occurrence}"):
                    check_result(run)
                    run = new()
                    if run.resume(f"{kind} {occurrence}"):
                        raise SystemExit(f"A run must reach the operation {kind} {occurrence}.")
            log(f"{total + run.kills} kills, one of them before {kind}")
        run.resume()
        check_result(run)
        log(f"{total} kills before file operations, at most {lost} steps lost")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60, help="number of kills at random times")
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
