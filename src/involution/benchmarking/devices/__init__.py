"""Devices of ``involution bench``: timers, memory, and the rates of their rooflines."""

import keras

from involution.benchmarking.devices.base import Bandwidth
from involution.benchmarking.devices.cpu import Cpu
from involution.benchmarking.devices.jax_cuda import JaxCuda
from involution.benchmarking.devices.torch_cuda import CaptureError, TorchCuda

Device = Cpu | TorchCuda | JaxCuda
CUDA = JaxCuda() if keras.config.backend() == "jax" else TorchCuda()
DEVICES: dict[str, Device] = {device.name: device for device in (Cpu(), CUDA)}

__all__ = ["CUDA", "DEVICES", "Bandwidth", "CaptureError", "Cpu", "Device", "JaxCuda", "TorchCuda"]
