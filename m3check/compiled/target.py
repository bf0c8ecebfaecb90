"""A target's driver without its GPU: what Triton and a wrapper ask before they launch, by the target's own figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from m3check.arch import Arch


def gpu_target(arch: Arch) -> Any:
    """The target in Triton's words."""
    from triton.backends.compiler import GPUTarget

    if arch.vendor == "amd":
        return GPUTarget("hip", arch.name, arch.warp_size)
    major, minor = arch.capability
    return GPUTarget("cuda", major * 10 + minor, arch.warp_size)


class Driver:
    """Stands for the target's Triton driver: it knows the target and cannot load anything."""

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        self._target = gpu_target(arch)
        self.utils = self

    def get_current_target(self) -> Any:
        """What launches are compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """The only device."""
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        """The default stream."""
        return 0

    def get_active_torch_device(self) -> Any:
        """Where the tensors of a captured call are."""
        import torch

        return torch.device("cpu")

    def get_device_properties(self, device: int = 0) -> dict[str, int]:
        """The figures that Triton's own driver gives."""
        return {
            "max_shared_mem": self._arch.shared_memory,
            "max_num_regs": self._arch.registers_unit,
            "multiprocessor_count": self._arch.multiprocessors,
            "warpSize": self._arch.warp_size,
        }


@dataclass(frozen=True)
class Properties:
    """The fields of torch.cuda.get_device_properties that launch code reads."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    warp_size: int
    shared_memory_per_block: int
    shared_memory_per_block_optin: int
    shared_memory_per_multiprocessor: int
    regs_per_multiprocessor: int
    max_threads_per_multi_processor: int
    gcnArchName: str


def properties(arch: Arch) -> Properties:
    """A target's device as torch describes it."""
    default = arch.shared_memory if arch.vendor == "amd" else 48 * 1024
    return Properties(
        arch.product.partition(",")[0],
        *arch.capability,
        arch.multiprocessors,
        arch.warp_size,
        default,
        arch.shared_memory,
        arch.shared_memory_unit,
        arch.registers_unit,
        arch.warps * arch.warp_size,
        arch.name if arch.vendor == "amd" else "",
    )


def present(arch: Arch) -> None:
    """Answer in this process, for life, as if the target's GPU were there: Triton's launches, torch.cuda's questions.

    Raises RuntimeError where Triton's interpreter is on, under which nothing can be compiled.
    """
    import torch
    from triton import knobs
    from triton.runtime import driver

    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET must not be set where kernels are compiled")
    driver.set_active(Driver(arch))
    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda device=None: properties(arch)
    cuda.get_device_capability = lambda device=None: arch.capability
    cuda.get_device_name = lambda device=None: properties(arch).name
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: 1
