"""Kills runs, and shows that what is left of them is gone on with to the same bits.

    KERAS_BACKEND=jax python -m tests.support.kill_resume --kills 60

kills so many processes at random moments, and then one before each kind of change that a run makes
to a file. Each is gone on with; no step may be lost or done twice beyond the last checkpoint, and
in the end weights, history and the list of files must be those of a run that was left alone.
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

EVERY = 10  # steps between checkpoints
MODELS = "cnn:filters=4-4-4:hidden=8,cnn:filters=2-2-2:hidden=4"
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
MOST = 8  # kills of one run
# Each is a new one, but what it imports has been imported.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["involution.training.experiment", "involution.training.report", "sklearn.datasets"]
)


class Child:
    """The process that is killed: a run that tells a file of its steps and of every change of a
    file that it is about to make.

    Args:
        output: The run's folder.
        diary: The file that is told.
        fatal: Before which change to be killed: its name, a blank, its how manieth; "": none.
    """

    def __init__(self, output, diary, fatal):
        self.output = os.path.abspath(output)
        self.diary = os.open(diary, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.fatal, _, left = fatal.rpartition(" ")
        self.left = int(left or 0)

    def tell(self, *words):
        os.write(self.diary, (" ".join(map(str, words)) + "\n").encode())

    def change(self, what, path):
        if not os.path.abspath(path).startswith(self.output):
            return
        name = re.sub(r"\d{12}-[0-9a-f]+", "checkpoint", os.path.relpath(path, self.output))
        name = f"{what}:{re.sub(r'-[a-z0-9_]{8}(?=[.])', '', name)}"
        self.tell("change", name)
        if name == self.fatal:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event, arguments):
        if event in CHANGES:
            self.change(event, os.fspath(arguments[0]))
        elif event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self.change(event, os.fsdecode(arguments[0]))

    def main(self):
        from involution.training import checkpoint, experiment

        console, real_sync, real_save = experiment.Silent(), os.fsync, checkpoint.Store.save

        def sync(handle):
            self.change("fsync", os.readlink(f"/proc/self/fd/{handle}"))
            real_sync(handle)

        def save(store, arrays, state):
            saved = real_save(store, arrays, state)
            self.tell("saved")
            return saved

        os.fsync, checkpoint.Store.save = sync, save
        console.start = lambda label, total, done=0: self.tell("start", done, label)
        console.step = lambda: self.tell("step")
        sys.addaudithook(self.audit)
        self.tell("begin")
        config = experiment.Config("digits", MODELS, epochs=2, recipe="one-cycle", batch_size=64)
        run = experiment.compare(config, self.output, console, resume=True, checkpoint_every=EVERY)
        digest = hashlib.sha256(experiment.history(run.results).encode())
        for result in run.results:
            for weight in result.classifier.model.get_weights():
                digest.update(weight.tobytes())
        self.tell("end", digest.hexdigest(), *sorted(os.listdir(self.output)))


def train(*arguments):
    Child(*arguments).main()


class Killed:
    """A run that is begun, killed and gone on with until it ends.

    Attributes:
        kills: How often it was killed.
        seconds: From its last beginning, when all is imported, to its end.
        lines: What its processes told.
        lost: The most steps that a kill cost; ``EVERY`` at most.
    """

    def __init__(self, folder):
        self.output, self.diary = folder / "run", folder / "diary"
        self.kills, self.seconds, self.lines, self.lost = 0, 0.0, [], 0

    def go_on(self, fatal="", after=None) -> bool:
        """Whether it came to its end; ``after``: it is killed so many seconds after it began."""
        before = self._read()
        process = PROCESSES.Process(target=train, args=(self.output, self.diary, fatal))
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
            raise SystemExit(f"A run must go on; it ended with status {code}.")
        self.lines = self._read()
        self._check(before, self.lines[len(before) :])
        self.kills += code != 0
        return code == 0

    def _read(self) -> list[str]:
        text = self.diary.read_text() if self.diary.exists() else ""
        # A line that a kill cut off has not been told.
        return text[: text.rfind("\n") + 1].splitlines()

    def _check(self, before, now):
        """No step is lost that a checkpoint held, and none is done again."""
        start = next((line for line in now if line.startswith("start ")), None)
        if start is None:
            return
        done, label = start.split(" ")[1:]
        saved = steps = 0
        here = False
        for line in before:
            if line.startswith("start "):
                begun, of = line.split(" ")[1:]
                here = of == label
                saved = steps = int(begun) if here else 0
            elif here and line == "step":
                steps += 1
            elif here and line == "saved":
                saved = steps
        if not saved <= int(done) <= steps:
            raise SystemExit(f"{steps} steps, {saved} of them saved, were gone on from at {done}")
        self.lost = max(self.lost, steps - int(done))


def say(text):
    print(text, flush=True)


def main(kills, seed):
    rng = random.Random(seed)  # noqa: S311 - no secret
    lost = total = 0
    with tempfile.TemporaryDirectory(prefix="crash-") as place:

        def new() -> Killed:
            return Killed(pathlib.Path(tempfile.mkdtemp(dir=place)))

        def end(run):
            nonlocal lost, total
            if run.lines[-1] != whole.lines[-1]:
                raise SystemExit(f"It ended as {run.lines[-1]}, not as {whole.lines[-1]}")
            lost, total = max(lost, run.lost), total + run.kills

        whole = new()
        whole.go_on()
        changes = collections.Counter(
            line.removeprefix("change ") for line in whole.lines if line.startswith("change ")
        )
        say(
            f"left alone: {whole.lines.count('step')} steps, {whole.seconds:.1f} s, "
            f"{changes.total()} changes of files, of {len(changes)} kinds"
        )
        say(whole.lines[-1])
        while total < kills:
            run = new()
            while run.kills < min(MOST, kills - total):
                if run.go_on(after=rng.uniform(0, whole.seconds)):
                    break
            else:
                run.go_on()
            end(run)
            say(f"{total} kills at random moments, {lost} steps lost at most")
        total = 0
        run = new()
        for kind, count in changes.items():
            # There are two checkpoints before one is removed.
            for time_ in range(1, min(count, 3) + 1):
                if run.go_on(f"{kind} {time_}"):
                    end(run)
                    run = new()
                    if run.go_on(f"{kind} {time_}"):
                        raise SystemExit(f"A run must come to a change: {kind} {time_}")
            say(f"{total + run.kills} kills, one of them before {kind}")
        run.go_on()
        end(run)
        say(f"{total} kills before changes of files, {lost} steps lost at most")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60, help="at random moments")
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
