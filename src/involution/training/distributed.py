"""Who trains together: the devices of one machine, or of several hosts, by ``keras.distribution``.

Every host runs the same program and takes its part of every batch; JAX adds up the gradients, and
the statistics of batch normalizations, over all. Weights are the same everywhere.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterator

import keras
import numpy as np

from involution.utils.errors import InputError

# Seconds that a host is waited for at the beginning, and that one may be silent.
WAIT, SILENCE = 60, 30
# The variables by which Keras is told the same.
ADDRESS, COUNT, NUMBER = (
    f"KERAS_DISTRIBUTION_{name}" for name in ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")
)
# What JAX's errors name when another host is silent: what they speak through.
SILENT = re.compile(
    "[Gg]loo|NCCL|nccl|UNAVAILABLE:|DEADLINE_EXCEEDED|oordination service|Connection (reset|closed)"
)
# What other launchers set, under which every process would train a model of its own in silence.
LAUNCHERS = {"torch": ("WORLD_SIZE", "torchrun"), "tensorflow": ("TF_CONFIG", "TF_CONFIG")}


class LostHostError(InputError):
    """Another host does not answer any more."""


@dataclasses.dataclass(frozen=True)
class Share:
    """A host's part of a batch.

    Attributes:
        index: Which images.
        weights: 0 for those that only fill it up, 1 for all others.
        count: Images of all hosts.
        whole: The same, with those that fill up.
    """

    index: np.ndarray
    weights: np.ndarray
    count: int
    whole: int


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Hosts and their devices.

    Attributes:
        devices: Of each host; None: all that JAX has there.
        coordinator: HOST:PORT of the first host, which all can reach; None where there is one host.
        hosts: How many.
        host: Which one this is, from 0.
    """

    devices: int | None = 1
    coordinator: str | None = None
    hosts: int = 1
    host: int = 0

    def __post_init__(self):
        if self.devices is not None and self.devices < 1:
            raise InputError(f"--devices must be at least 1. Received: {self.devices}")
        if self.hosts < 1:
            raise InputError(f"--num-hosts must be at least 1. Received: {self.hosts}")
        if not 0 <= self.host < self.hosts:
            raise InputError(f"--host-id must be from 0 to {self.hosts - 1}. Received: {self.host}")
        if self.hosts > 1 and not re.fullmatch(r"\S+:\d{1,5}", self.coordinator or ""):
            raise InputError(
                "--coordinator must be HOST:PORT of the first host where there are several. "
                f"Received: {self.coordinator}"
            )

    @property
    def alone(self) -> bool:
        return self.hosts == 1 and self.devices == 1

    @property
    def writes(self) -> bool:
        """Whether this is the host that writes for all."""
        return self.host == 0

    @property
    def total(self) -> int:
        """Devices of all hosts, once it has begun."""
        return 1 if self.alone else len(keras.distribution.list_devices())

    def check_batch(self, size, accumulate=1):
        """Raises InputError unless a batch can be shared evenly, in so many parts."""
        if size % (self.total * accumulate):
            factors = (("the devices of all hosts", self.total), ("--accumulate", accumulate))
            told = " times ".join(f"{name}, {n}" for name, n in factors if n > 1)
            raise InputError(f"--batch-size must be a multiple of {told}. Received: {size}")

    def share(self, index) -> Share:
        """This host's part of a batch of these images: as many for each device."""
        count = len(index)
        whole = -(-count // self.total) * self.total
        place = np.arange(whole)
        # Once more the first ones, for devices that have fewer.
        filled, weights = index[place % count], (place < count).astype("float32")
        each = whole // self.hosts
        own = slice(self.host * each, (self.host + 1) * each)
        return Share(filled[own], weights[own], count, whole)

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Within the block models are made for, and trained by, all devices."""
        if self.alone:
            yield
            return
        before = keras.distribution.distribution()
        keras.distribution.set_distribution(_over_all())
        try:
            yield
        finally:
            keras.distribution.set_distribution(before)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Within the block, what JAX raises when a host does not answer is a LostHostError."""
        try:
            yield
        except InputError:
            raise
        except (ValueError, RuntimeError) as error:
            if self.hosts == 1 or not SILENT.search(str(error)):
                raise
            raise LostHostError(
                "All hosts must go on to the end. Received: one that was lost: "
                f"{str(error).splitlines()[0]}"
            ) from error

    def wait_for_all(self, what):
        """Returns when every host has come here."""
        if self.hosts > 1:
            from jax.experimental import multihost_utils

            with self.answering():
                multihost_utils.sync_global_devices(what)

    def check_same(self, text, what):
        """Raises InputError, on every host, unless all have the same text; ``what`` they must."""
        if self.hosts > 1:
            from jax.experimental import multihost_utils

            own = np.frombuffer(hashlib.sha256(text.encode()).digest(), "uint8").astype("int32")
            with self.answering():
                found = multihost_utils.process_allgather(own)
            others = [n for n, digest in enumerate(found) if (digest != found[0]).any()]
            if others:
                raise InputError(
                    f"All hosts must {what}. Received: others on host {others[0]} than on host 0"
                )

    def end(self):
        """All are at the end: from here on each goes its own way."""
        if self.hosts > 1:
            self.wait_for_all("the end")
            import jax

            jax.distributed.shutdown()


@functools.cache
def _over_all():
    """Made once: every batch asks."""
    return keras.distribution.DataParallel(
        devices=keras.distribution.list_devices(), auto_shard_dataset=False
    )


ALONE = Cluster()


def of(devices=None, coordinator=None, hosts=None, host=None, environment=os.environ) -> Cluster:
    """The cluster that is asked for; of hosts, what is None is taken from Keras's variables."""
    numbers = {}
    for name, given, variable, default in (
        ("hosts", hosts, COUNT, 1),
        ("host", host, NUMBER, 0),
    ):
        value = environment.get(variable, default) if given is None else given
        if not str(value).isdecimal():
            raise InputError(f"{variable} must be a number. Received: {value}")
        numbers[name] = int(value)
    if coordinator is None and ADDRESS in environment:
        coordinator = environment[ADDRESS].split(",")[0]
    if devices is None and numbers["hosts"] == 1:
        devices = 1
    return Cluster(devices, coordinator, **numbers)


def refuse_others(cluster, environment=os.environ):
    """Raises InputError where this, or another launcher's cluster, would go wrong in silence."""
    backend = keras.config.backend()
    if not cluster.alone and backend != "jax":
        raise InputError(
            "--devices and --num-hosts need the JAX backend: --backend jax "
            f"(pip install 'involution[jax]'). Received: {backend}"
        )
    variable, launcher = LAUNCHERS.get(backend, (None, None))
    value = environment.get(variable, "") if variable else ""
    if value not in ("", "0", "1"):
        raise InputError(
            f"Under {launcher} every process would train a model of its own; several train one "
            f"with --backend jax --num-hosts. Received: {variable}={value}"
        )
    if backend == "tensorflow":
        import tensorflow as tf

        if tf.distribute.has_strategy():
            raise InputError(
                "Training must be outside of a tf.distribute strategy; several devices train with "
                f"the JAX backend. Received: {tf.distribute.get_strategy().__class__.__name__}"
            )


def begin(cluster):
    """Makes the devices known to JAX, before anything else uses them; waits for the other hosts.

    Raises:
        InputError: It cannot be: another backend, hosts that do not come, too few devices.
    """
    refuse_others(cluster)
    if cluster.alone:
        return
    import jax

    if cluster.devices is not None:
        try:
            # On CPUs there are as many as one asks for.
            jax.config.update("jax_num_cpu_devices", cluster.devices)
        except RuntimeError as error:
            raise InputError(
                "--devices must be told before JAX is used. "
                f"Received: {cluster.devices}: {str(error).splitlines()[0]}"
            ) from error
    if cluster.hosts > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        try:
            jax.distributed.initialize(
                cluster.coordinator,
                cluster.hosts,
                cluster.host,
                initialization_timeout=WAIT,
                heartbeat_timeout_seconds=SILENCE,
                shutdown_timeout_seconds=SILENCE,
            )
        except RuntimeError as error:
            raise InputError(
                f"All {cluster.hosts} hosts must come to --coordinator within {WAIT} s. Received: "
                f"{cluster.coordinator}, host {cluster.host}: {str(error).splitlines()[0]}"
            ) from error
        # What JAX's processes speak through opens now: later it would wait for 30 s alone.
        cluster.wait_for_all("all have come")
    found = jax.local_device_count()
    if cluster.devices is not None and found != cluster.devices:
        raise InputError(
            f"--devices must be as many as JAX has here, {found}. Received: {cluster.devices}"
        )
    if found * cluster.hosts != jax.device_count():
        raise InputError(
            "All hosts must have as many devices; --devices can tell how many. "
            f"Received: {found} here, {jax.device_count()} on {cluster.hosts} hosts"
        )
