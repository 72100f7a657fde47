"""Data-parallel training on several devices and hosts with ``keras.distribution``.

Every host runs the same program and processes its part of each batch; JAX sums the gradients and
the batch-normalization statistics over all devices. Weights are replicated.
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

# Seconds to wait for all hosts at the start, and for a heartbeat before a host counts as lost.
CONNECT_TIMEOUT, HEARTBEAT_TIMEOUT = 60, 30
# Keras's environment variables for the same settings.
JOB_ADDRESSES, NUM_PROCESSES, PROCESS_ID = (
    f"KERAS_DISTRIBUTION_{name}" for name in ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")
)
# After the loss of a host, JAX's errors name the communication layer.
LOST_HOST_PATTERN = re.compile(
    "[Gg]loo|NCCL|nccl|UNAVAILABLE:|DEADLINE_EXCEEDED|oordination service|Connection (reset|closed)"
)
# By backend, the environment variable and the name of a launcher whose processes would each train
# their own model.
LAUNCHERS = {"torch": ("WORLD_SIZE", "torchrun"), "tensorflow": ("TF_CONFIG", "TF_CONFIG")}


class LostHostError(InputError):
    """Another host no longer responds."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """This host's part of a batch.

    Attributes:
        indices: Indices of its images.
        weights: 0 for images that pad the batch, 1 for all others.
        count: Images of the batch on all hosts.
        padded_count: The same, including the padding.
    """

    indices: np.ndarray
    weights: np.ndarray
    count: int
    padded_count: int


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Processes, one for each host, and their devices.

    Attributes:
        devices: Devices of each host; None: all that JAX finds.
        coordinator_address: HOST:PORT of the first host, reachable by all; None for one host.
        num_processes: Number of hosts.
        process_id: Index of this host, from 0.
    """

    devices: int | None = 1
    coordinator_address: str | None = None
    num_processes: int = 1
    process_id: int = 0

    def __post_init__(self):
        if self.devices is not None and self.devices < 1:
            raise InputError(f"`devices` must be at least 1. Received: {self.devices}")
        if self.num_processes < 1:
            raise InputError(f"`num_processes` must be at least 1. Received: {self.num_processes}")
        if not 0 <= self.process_id < self.num_processes:
            raise InputError(
                f"`process_id` must be from 0 to {self.num_processes - 1}. "
                f"Received: {self.process_id}"
            )
        address = self.coordinator_address
        if self.num_processes > 1 and not re.fullmatch(r"\S+:\d{1,5}", address or ""):
            raise InputError(
                "`coordinator_address` must be HOST:PORT of the first host if there are several. "
                f"Received: {address}"
            )

    @property
    def is_single(self) -> bool:
        """Whether there is only one device."""
        return self.num_processes == 1 and self.devices == 1

    @property
    def is_primary(self) -> bool:
        """Whether this host writes the files of the run."""
        return self.process_id == 0

    @property
    def num_devices(self) -> int:
        """Devices of all hosts, after ``initialize``."""
        return 1 if self.is_single else len(keras.distribution.list_devices())

    def check_batch_size(self, batch_size, gradient_accumulation_steps=1):
        """Raises InputError unless a batch divides evenly among the devices and the accumulation
        steps."""
        if batch_size % (self.num_devices * gradient_accumulation_steps):
            factors = (
                ("the number of devices", self.num_devices),
                ("`gradient_accumulation_steps`", gradient_accumulation_steps),
            )
            product = " times ".join(f"{name} ({n})" for name, n in factors if n > 1)
            raise InputError(
                f"`batch_size` must be a multiple of {product}. Received: {batch_size}"
            )

    def shard(self, indices) -> Shard:
        """This host's part of a batch, with the same number of images for each device."""
        count = len(indices)
        padded_count = -(-count // self.num_devices) * self.num_devices
        positions = np.arange(padded_count)
        # The first images pad the batch.
        padded = indices[positions % count]
        weights = (positions < count).astype("float32")
        size = padded_count // self.num_processes
        own = slice(self.process_id * size, (self.process_id + 1) * size)
        return Shard(padded[own], weights[own], count, padded_count)

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Within the block models are created and trained on all devices."""
        if self.is_single:
            yield
            return
        before = keras.distribution.distribution()
        keras.distribution.set_distribution(_data_parallel())
        try:
            yield
        finally:
            keras.distribution.set_distribution(before)

    @contextlib.contextmanager
    def detect_lost_hosts(self) -> Iterator[None]:
        """Within the block, JAX's errors after the loss of a host become LostHostError."""
        try:
            yield
        except InputError:
            raise
        except (ValueError, RuntimeError) as error:
            if self.num_processes == 1 or not LOST_HOST_PATTERN.search(str(error)):
                raise
            raise LostHostError(f"A host was lost: {str(error).splitlines()[0]}") from error

    def barrier(self, name):
        """Waits until every host has reached this point."""
        if self.num_processes > 1:
            from jax.experimental import multihost_utils

            with self.detect_lost_hosts():
                multihost_utils.sync_global_devices(name)

    def assert_equal_across_hosts(self, text, requirement):
        """Raises InputError on every host unless all have the same text.

        Args:
            text: The text.
            requirement: What all hosts must do, for the message.
        """
        if self.num_processes > 1:
            from jax.experimental import multihost_utils

            digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), "uint8").astype("int32")
            with self.detect_lost_hosts():
                found = multihost_utils.process_allgather(digest)
            others = [n for n, other in enumerate(found) if (other != found[0]).any()]
            if others:
                raise InputError(
                    f"All hosts must {requirement}. Received: host {others[0]} differs from host 0"
                )

    def shutdown(self):
        """Waits for all hosts, and disconnects from them."""
        if self.num_processes > 1:
            self.barrier("the end")
            import jax

            jax.distributed.shutdown()


@functools.cache
def _data_parallel():
    return keras.distribution.DataParallel(
        devices=keras.distribution.list_devices(), auto_shard_dataset=False
    )


SINGLE_PROCESS = Distribution()


def from_environment(
    devices=None,
    coordinator_address=None,
    num_processes=None,
    process_id=None,
    environment=os.environ,
) -> Distribution:
    """Creates a distribution; host arguments default to Keras's environment variables."""
    numbers = {}
    for name, given, variable, default in (
        ("num_processes", num_processes, NUM_PROCESSES, 1),
        ("process_id", process_id, PROCESS_ID, 0),
    ):
        value = environment.get(variable, default) if given is None else given
        if not str(value).isdecimal():
            source = variable if given is None else f"`{name}`"
            raise InputError(f"{source} must be a nonnegative integer. Received: {value}")
        numbers[name] = int(value)
    if coordinator_address is None and JOB_ADDRESSES in environment:
        coordinator_address = environment[JOB_ADDRESSES].split(",")[0]
    if devices is None and numbers["num_processes"] == 1:
        devices = 1
    return Distribution(devices, coordinator_address, **numbers)


def check_launchers(distribution, environment=os.environ):
    """Raises InputError if several processes would silently train separate models."""
    backend = keras.config.backend()
    if not distribution.is_single and backend != "jax":
        raise InputError(
            "`devices` and `num_processes` require the JAX backend: KERAS_BACKEND=jax "
            f"(pip install 'involution[jax]'). Received: {backend}"
        )
    variable, launcher = LAUNCHERS.get(backend, (None, None))
    value = environment.get(variable, "") if variable else ""
    if value not in ("", "0", "1"):
        raise InputError(
            f"Under {launcher} each process would train its own model; distributed training "
            f"requires the JAX backend and `num_processes`. Received: {variable}={value}"
        )
    if backend == "tensorflow":
        import tensorflow as tf

        if tf.distribute.has_strategy():
            raise InputError(
                "Training must be outside a tf.distribute strategy; distributed training requires "
                f"the JAX backend. Received: {tf.distribute.get_strategy().__class__.__name__}"
            )


def initialize(distribution):
    """Configures JAX's devices, before anything else uses them, and connects to the other hosts.

    Raises:
        InputError: Another backend is in use, a host does not connect, or there are too few
            devices.
    """
    check_launchers(distribution)
    if distribution.is_single:
        return
    import jax

    if distribution.devices is not None:
        try:
            # On CPUs JAX creates as many devices as requested.
            jax.config.update("jax_num_cpu_devices", distribution.devices)
        except RuntimeError as error:
            raise InputError(
                "`devices` must be set before JAX is initialized. "
                f"Received: {distribution.devices}: {str(error).splitlines()[0]}"
            ) from error
    num_processes, address = distribution.num_processes, distribution.coordinator_address
    if num_processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        try:
            jax.distributed.initialize(
                address,
                num_processes,
                distribution.process_id,
                initialization_timeout=CONNECT_TIMEOUT,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
                shutdown_timeout_seconds=HEARTBEAT_TIMEOUT,
            )
        except RuntimeError as error:
            raise InputError(
                f"All {num_processes} hosts must connect to `coordinator_address` within "
                f"{CONNECT_TIMEOUT} s. Received: {address}, host {distribution.process_id}: "
                f"{str(error).splitlines()[0]}"
            ) from error
        # Opens the connections now; later, each host would wait only 30 s for the others.
        distribution.barrier("start")
    found = jax.local_device_count()
    if distribution.devices is not None and found != distribution.devices:
        raise InputError(
            f"`devices` must be the number of JAX's local devices, {found}. "
            f"Received: {distribution.devices}"
        )
    if found * num_processes != jax.device_count():
        raise InputError(
            "All hosts must have the same number of devices; `devices` limits it. "
            f"Received: {found} here, {jax.device_count()} on {num_processes} hosts"
        )
