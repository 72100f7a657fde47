"""Distributed training: equivalence to one device, invalid settings, lost hosts."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

from involution.training import distributed, experiment, report
from involution.training.augmentation import augment
from involution.training.recipes import Recipe
from involution.training.trainer import Trainer
from involution.utils.errors import InputError
from tests.support import distributed_runs
from tests.support.backends import BACKEND
from tests.support.images import write_folder
from tests.support.multihost import free_port

on_jax = pytest.mark.skipif(BACKEND != "jax", reason="only JAX shards batches")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": 0}, "`devices` must be at least 1. Received: 0"),
        ({"num_processes": 0}, "`num_processes` must be at least 1. Received: 0"),
        (
            {"num_processes": 2, "process_id": 2, "coordinator_address": "a:1"},
            "`process_id` must be from 0 to 1. Received: 2",
        ),
        ({"num_processes": 2}, "`coordinator_address` must be HOST:PORT .* Received: None"),
        (
            {"num_processes": 2, "coordinator_address": "a"},
            "`coordinator_address` must be HOST:PORT .* Received: a",
        ),
    ],
)
def test_invalid_distribution_is_rejected(arguments, message):
    with pytest.raises(InputError, match=message):
        distributed.from_environment(**arguments, environment={})


def test_distribution_from_keras_environment_variables():
    variables = {
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": "one:12,two:12",
        "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
        "KERAS_DISTRIBUTION_PROCESS_ID": "1",
    }
    assert distributed.from_environment(environment=variables) == distributed.Distribution(
        None, "one:12", 2, 1
    )
    # Arguments take precedence.
    assert distributed.from_environment(4, "other:1", 3, 0, variables) == distributed.Distribution(
        4, "other:1", 3, 0
    )
    assert distributed.from_environment(environment={}) == distributed.SINGLE_PROCESS
    with pytest.raises(
        InputError, match="KERAS_DISTRIBUTION_NUM_PROCESSES must be a nonnegative integer"
    ):
        distributed.from_environment(environment={"KERAS_DISTRIBUTION_NUM_PROCESSES": "two"})


def test_backend_other_than_jax_is_rejected(monkeypatch):
    distributed.initialize(distributed.SINGLE_PROCESS)
    backend = "torch" if BACKEND == "jax" else BACKEND
    monkeypatch.setattr(keras.config, "backend", lambda: backend)
    message = f"require the JAX backend: KERAS_BACKEND=jax .* Received: {backend}"
    with pytest.raises(InputError, match=message):
        distributed.initialize(distributed.Distribution(devices=2))


@on_jax
def test_devices_must_be_set_before_jax_starts():
    keras.ops.zeros(()) + 1
    message = r"`devices` must be set before JAX is initialized\. Received: 2:"
    with pytest.raises(InputError, match=message):
        distributed.initialize(distributed.Distribution(devices=2))


@pytest.mark.parametrize(
    ("backend", "variable"), [("torch", "WORLD_SIZE"), ("tensorflow", "TF_CONFIG")]
)
def test_torch_and_tensorflow_launchers_are_rejected(backend, variable, monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: backend)
    with pytest.raises(InputError, match=f"would train its own model.* Received: {variable}=2"):
        distributed.check_launchers(distributed.SINGLE_PROCESS, {variable: "2"})


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute requires TensorFlow")
def test_tensorflow_strategy_is_rejected():
    import tensorflow as tf

    with (
        tf.distribute.MirroredStrategy(["CPU:0"]).scope(),
        pytest.raises(InputError, match=r"outside a tf.distribute strategy.* MirroredStrategy"),
    ):
        distributed.check_launchers(distributed.SINGLE_PROCESS, {})


def test_shard_splits_and_pads_the_batch(monkeypatch):
    monkeypatch.setattr(distributed.Distribution, "num_devices", 6)
    full_batch, last_batch = np.arange(20, 32), np.arange(40, 50)
    shards = [distributed.Distribution(2, "a:1", 3, n).shard(full_batch) for n in range(3)]
    assert [list(s.indices) for s in shards] == [
        [20, 21, 22, 23],
        [24, 25, 26, 27],
        [28, 29, 30, 31],
    ]
    assert all(s.weights.min() == 1 and (s.count, s.padded_count) == (12, 12) for s in shards)
    # Ten images on six devices: two padding images have weight 0.
    shards = [distributed.Distribution(2, "a:1", 3, n).shard(last_batch) for n in range(3)]
    assert [list(s.indices) for s in shards] == [
        [40, 41, 42, 43],
        [44, 45, 46, 47],
        [48, 49, 40, 41],
    ]
    assert [list(s.weights) for s in shards] == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    assert all((s.count, s.padded_count) == (10, 12) for s in shards)


def test_shard_on_one_device_is_the_batch():
    shard = distributed.SINGLE_PROCESS.shard(np.array([5, 3, 4]))
    assert list(shard.indices) == [5, 3, 4]
    assert (list(shard.weights), shard.count, shard.padded_count) == ([1, 1, 1], 3, 3)


@pytest.mark.long
@pytest.mark.parametrize(
    ("num_devices", "batch_size", "accumulation", "message"),
    [
        (3, 16, 1, r"`batch_size` must be a multiple of the number of devices \(3\). Received: 16"),
        (2, 16, 4, None),
        (2, 12, 4, r"of devices \(2\) times `gradient_accumulation_steps` \(4\). Received: 12"),
        (1, 10, 4, r"must be a multiple of `gradient_accumulation_steps` \(4\). Received: 10"),
        (2, 48, 4, "at least 48 images, for one batch. Received: 40 training images"),
        (48, 48, 1, "at least 48 images, one for each device. Received: 40 training images"),
    ],
)
def test_indivisible_batches_are_rejected(
    num_devices, batch_size, accumulation, message, monkeypatch
):
    monkeypatch.setattr(distributed.Distribution, "num_devices", num_devices)
    recipe = Recipe(0.1, batch_size=batch_size, gradient_accumulation_steps=accumulation)
    if message is None:
        Trainer(distributed_runs.network(), distributed_runs.dataset(), recipe, 1, 0)
        return
    with pytest.raises(InputError, match=message):
        Trainer(distributed_runs.network(), distributed_runs.dataset(), recipe, 1, 0)


@on_jax
def test_augmentations_and_steps_of_several_devices_exclude_each_other(monkeypatch):
    """Both together may deadlock in XLA's threads."""
    active, overlaps = [], []

    def exclusive(function):
        def run(*args, **kwargs):
            active.append(function)
            time.sleep(0.02)  # the other thread has time to begin
            overlaps.append(len(active))
            try:
                return function(*args, **kwargs)
            finally:
                active.remove(function)

        return run

    recipe = Recipe(0.1, batch_size=8, augmentations="flip,color")
    distribution = distributed.Distribution(devices=2)
    trainer = Trainer(
        distributed_runs.network(), distributed_runs.dataset(), recipe, 1, 0, distribution
    )
    step = exclusive(trainer.compiled.train_on_batch)
    monkeypatch.setattr(trainer.compiled, "train_on_batch", step)
    monkeypatch.setattr("involution.training.trainer.augment", exclusive(augment))
    list(trainer.epochs())
    assert set(overlaps) == {1}
    assert len(overlaps) == 10


@on_jax
def test_weights_that_callbacks_restore_are_the_models(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write", lambda *_: None)
    (tmp_path / "own.py").write_text(
        "import keras\n"
        "class Zeros(keras.callbacks.Callback):\n"
        "    def on_train_end(self, logs=None):\n"
        "        for variable in self.model.trainable_variables:\n"
        "            variable.assign(keras.ops.zeros(variable.shape))\n"
        "def make(label): return [Zeros()]\n"
    )
    config = experiment.Config(
        str(write_folder(tmp_path / "pets")), "cnn", 1, callbacks=f"{tmp_path}/own.py:make"
    )
    distribution = distributed.Distribution(devices=2)
    run = experiment.compare(config, tmp_path / "run", distribution=distribution)
    model = run.results[0].classifier.model
    assert not any(keras.ops.convert_to_numpy(v).any() for v in model.trainable_variables)


def test_lost_hosts_are_distinguished_from_other_errors():
    two_hosts = distributed.Distribution(1, "a:1", 2, 0)

    def caught_error(distribution, raised):
        try:
            with distribution.detect_lost_hosts(), distribution.detect_lost_hosts():
                raise raised
        except ValueError as caught:
            return caught

    gloo_error = ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer\nmore")
    lost = caught_error(two_hosts, gloo_error)
    assert isinstance(lost, distributed.LostHostError)
    assert str(lost) == (
        "A host was lost: UNKNOWN: Gloo AllGather failed: Connection reset by peer"
    )
    assert caught_error(distributed.SINGLE_PROCESS, gloo_error) is gloo_error
    for other in (ValueError("Shapes must be equal"), InputError("The connection must be ...")):
        assert caught_error(two_hosts, other) is other


def environment():
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "JAX_ENABLE_X64": "1", "PYTHONPATH": path}


def train(folder, devices, hosts, flags=""):
    """Returns (metrics of each epoch, weights by name) for each host."""
    port = free_port()
    files = [folder / f"{devices}-{hosts}-{host}.npz" for host in range(hosts)]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                distributed_runs.__file__,
                *map(str, (devices, hosts, host, port, file)),
            ],
            env={**environment(), "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host, file in enumerate(files)
    ]
    results = []
    for process, file in zip(processes, files, strict=True):
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        with np.load(file) as weights:
            results.append((json.loads(output.splitlines()[-1]), dict(weights)))
    return results


def check_equal_to_one_device(folder, layouts):
    """Compares training on each layout, (devices per host, hosts), with training on one device."""
    ((expected_rows, expected_weights),) = train(folder, 1, 1)
    assert len(expected_rows) == 3
    assert sum("moving" in name for name in expected_weights) == 6
    for devices, hosts in layouts:
        for rows, weights in train(folder, devices, hosts):
            for row, expected in zip(rows, expected_rows, strict=True):
                # Keras computes losses in float32.
                assert row == pytest.approx(expected, rel=1e-6)
            assert weights.keys() == expected_weights.keys()
            for name, value in expected_weights.items():
                np.testing.assert_allclose(weights[name], value, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.long
@on_jax
def test_distributed_training_equals_one_device(tmp_path):
    check_equal_to_one_device(tmp_path, ((2, 2),))


@on_jax
@pytest.mark.slow
def test_other_device_and_host_counts_equal_one_device(tmp_path):
    check_equal_to_one_device(tmp_path, ((2, 1), (1, 2), (1, 4), (4, 1)))


@pytest.mark.long
@on_jax
def test_all_reduce_is_the_only_collective(tmp_path):
    """The native and the fused operator compute on the local shard only."""
    train(tmp_path, 2, 1, f"--xla_dump_to={tmp_path}/dump --xla_dump_hlo_as_text")
    texts = [f.read_text() for f in (tmp_path / "dump").glob("*after_optimizations.txt")]
    step = max(texts, key=lambda text: text.count(" all-reduce("))
    assert step.count(" all-reduce(") > 10
    assert "involution" in step
    others = "all-gather", "all-to-all", "collective-permute", "reduce-scatter"
    assert [name for name in others if f" {name}" in step] == []


COMMAND = (
    "train",
    "--model",
    "inn",
    "--dataset",
    "digits",
    "--batch-size",
    "64",
    "--backend",
    "jax",
)


def start_hosts(folder, count, *options, run="run"):
    """Starts the processes of a run, which write their output to host0.txt, host1.txt, ...

    `{host}` in an argument is replaced by the index of the host.
    """
    command = [sys.executable, "-m", "involution_cli", *COMMAND]
    options += ("--output", f"{folder}/{run}")
    if count > 1:
        command += [
            "--coordinator-address",
            f"127.0.0.1:{free_port()}",
            "--num-processes",
            str(count),
        ]
    for host in range(count):
        with open(folder / f"host{host}.txt", "w", encoding="utf-8") as file:
            yield subprocess.Popen(
                [
                    *command,
                    *(option.format(host=host) for option in options),
                    "--process-id",
                    str(host),
                ],
                env={**environment(), "JAX_ENABLE_X64": "0"},
                stdout=file,
                stderr=subprocess.STDOUT,
            )


def wait_for(folder, text, seconds=240):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if text in (folder / "host0.txt").read_text(encoding="utf-8"):
            return
        time.sleep(0.1)
    raise AssertionError((folder / "host0.txt").read_text(encoding="utf-8"))


@pytest.mark.long
@pytest.mark.slow
@on_jax
def test_hosts_with_different_settings_are_rejected(tmp_path):
    processes = list(start_hosts(tmp_path, 2, "--epochs", "1", "--seed", "{host}"))
    codes = [process.wait(240) for process in processes]
    assert codes == [2, 2]
    for host in range(2):
        assert (tmp_path / f"host{host}.txt").read_text(encoding="utf-8").splitlines()[-1] == (
            "involution: error: All hosts must have the same images, settings and versions. "
            "Received: host 1 differs from host 0"
        )


@pytest.mark.slow
@on_jax
def test_hosts_with_different_checkpoints_are_rejected(tmp_path):
    (single,) = start_hosts(tmp_path, 1, "--epochs", "1", run="run0")
    assert single.wait(240) == 0
    processes = list(start_hosts(tmp_path, 2, "--epochs", "1", "--resume", run="run{host}"))
    assert [process.wait(240) for process in processes] == [2, 2]
    for host in range(2):
        assert (tmp_path / f"host{host}.txt").read_text(encoding="utf-8").splitlines()[-1] == (
            "involution: error: All hosts must start from the same checkpoint of one folder. "
            "Received: host 1 differs from host 0"
        )
    assert not (tmp_path / "run1").exists()


@on_jax
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_run_resumes_on_fewer_hosts_after_host_loss(tmp_path, victim):
    options = "--epochs", "40", "--checkpoint-every", "5"
    processes = list(start_hosts(tmp_path, 2, *options))
    try:
        wait_for(tmp_path, "epoch 1/40")
        processes[victim].kill()
        killed_at = time.monotonic()
        exit_code = processes[1 - victim].wait(60)
        assert exit_code not in (0, -signal.SIGKILL), exit_code
        assert time.monotonic() - killed_at < 60
    finally:
        for process in processes:
            process.kill()
            process.wait()
    time.sleep(1)  # the last lines may arrive late
    output = (tmp_path / f"host{1 - victim}.txt").read_text(encoding="utf-8")
    assert "A host was lost" in output, output
    assert "--resume" in output
    (single,) = start_hosts(tmp_path, 1, "--epochs", "40", "--resume", "--checkpoint-every", "5")
    try:
        wait_for(tmp_path, "Resuming from checkpoint")
        single.send_signal(signal.SIGTERM)
        assert single.wait(240) == 143
    finally:
        single.kill()
        single.wait()
    history = (pathlib.Path(tmp_path) / "run" / "history.csv").read_text(encoding="utf-8")
    assert re.search(r"^inn,1,", history, re.MULTILINE)
