"""What SGLang's kernel files import of SGLang, as stand-ins that present a target."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m3check.arch import Arch
from m3check.kernels.standin import Modules


class _Platform:
    """What `get_platform()` answers on a target; what it is not asked today raises with its name."""

    def __init__(self, arch: Arch) -> None:
        self.is_sm90 = arch.name == "sm90"

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"m3check's stand-in for sglang's platform has no {name!r}")


class _Off:
    """A switch of `sglang.srt.environ.envs` that is off."""

    def get(self) -> bool:
        return False


class _Switches:
    """The CUDA selection of decode (a kernel that is compiled at run time, and not Triton's) is off: Triton's runs."""

    SGLANG_OPT_USE_MINIMAX_DECODE_TOPK_RADIX = _Off()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"m3check's stand-in for sglang's environment has no {name!r}")


def modules(folder: Path, tree: str, arch: Arch) -> Modules:
    """The modules of one version, whose kernel files are below `folder`/`tree`, in common, decode and prefill."""
    package = tree.replace("/", ".")
    made = Modules("sglang", folder, lambda name: name.startswith(f"{package}."))
    added: set[str] = set()

    def add(name: str, **attributes: Any) -> None:
        parent = name.rpartition(".")[0]
        if parent and parent not in added:
            add(parent)
        if name not in added:
            made.add(name, **attributes)
        added.add(name)

    for part in ("common", "decode", "prefill"):
        add(f"{package}.{part}")
    platform = _Platform(arch)
    add("sglang.srt.environ", envs=_Switches())
    add("sglang.srt.runtime_context", get_platform=lambda: platform)
    add("sglang.srt.utils", is_gfx95_supported=lambda: arch.name == "gfx950", is_xpu=lambda: False)
    return made


@contextmanager
def presented(arch: Arch) -> Iterator[None]:
    """While kernel files are imported: torch says that it was made for ROCm where the target is AMD's, as they ask it."""
    import torch

    hip = torch.version.hip
    if arch.vendor == "amd":
        torch.version.hip = hip or "0.0"
    try:
        yield
    finally:
        torch.version.hip = hip
