"""A CPU as a verl platform (``VERL_PLATFORM=cpu``).

verl addresses its device through ``torch.<device>``; ``torch.cpu`` lacks the memory, random-state and name calls that
it makes there, so they are added around it. Nothing in verl or torch is changed.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry


class _DeviceId(str):
    """The current device: ``tensor.to(x)`` sees ``cpu``, ``f"{device_name}:{x}"`` sees ``cpu:0``."""

    def __format__(self, spec: str) -> str:
        return "0"


class _DeviceModule(types.ModuleType):
    """``torch.cpu`` plus what verl calls on ``torch.cuda``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    @staticmethod
    def mem_get_info(*_: Any) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    @staticmethod
    def get_rng_state(*_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, *_: Any) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_device_name(*_: Any) -> str:
        return "CPU"

    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)


def _device_module() -> _DeviceModule:
    module = _DeviceModule("parallel_r1_cpu_device")
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, lambda *_, **__: 0)
    for name in (
        "empty_cache",
        "ipc_collect",
        "reset_peak_memory_stats",
        "reset_accumulated_memory_stats",
        "set_device",
        "synchronize",
    ):
        setattr(module, name, lambda *_, **__: None)
    return module


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """CPU ranks over gloo. To Ray they are logical GPUs (``ray.init(num_gpus=N)``), the only kind verl asks for."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _device_module()

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return _DeviceId("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "VERL_CPU_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False  # weights travel through POSIX shared memory instead

    def cudart(self) -> None:
        return None
