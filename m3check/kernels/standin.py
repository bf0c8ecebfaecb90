"""The few modules that a project's kernel files import, so that they run without it; the platform presents ARCH.

`Modules` is any project's, `World` vLLM's; a project's own packages are never executed. The modules are in `sys.modules`
only while a kernel file is imported or called, since some files import lazily, inside functions; so several versions can
live in one process, beside the real project.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

from m3check.arch import Arch


class Capability(NamedTuple):
    """As vLLM's platforms say it."""

    major: int
    minor: int


class Platform:
    """What `vllm.platforms.current_platform` answers on a target; what it is not asked today raises with its name."""

    def __init__(self, arch: Arch, pdl: bool) -> None:
        self._arch, self._pdl = arch, pdl

    def is_cuda(self) -> bool:
        """Whether the target is NVIDIA's."""
        return self._arch.vendor == "nvidia"

    def is_rocm(self) -> bool:
        """Whether the target is AMD's."""
        return self._arch.vendor == "amd"

    def is_device_capability(self, capability: tuple[int, int] | int, device_id: int = 0) -> bool:
        """Whether the target has exactly this compute capability, as (major, minor) or as one number such as 120."""
        major, minor = self._arch.capability
        return capability == (major, minor) if isinstance(capability, tuple) else capability == major * 10 + minor

    def get_device_capability(self, device_id: int = 0) -> Capability | None:
        """The compute capability; AMD's targets have none that vLLM asks for."""
        return Capability(*self._arch.capability) if self.is_cuda() else None

    def is_arch_support_pdl(self) -> bool:
        """Whether kernels are launched with programmatic dependent launch."""
        return self._pdl

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"m3check's stand-in for vllm.platforms.current_platform has no {name!r}")


class Modules:
    """One version's modules: stand-ins, empty shells of its packages, and its kernel files as they are imported."""

    def __init__(self, root: str, folder: Path, executed: Callable[[str], bool]) -> None:
        """Modules of package `root`; only those whose dotted name is `executed` are read from `folder`."""
        self._root = root
        self._modules: dict[str, ModuleType] = {}
        self._outside: list[dict[str, ModuleType]] = []  # what was there when the world was entered, innermost last
        self._finder = _Finder(root, folder, executed)

    @property
    def executed(self) -> Mapping[str, Path]:
        """Dotted name and file of each module that was read from the folder so far."""
        return {name: Path(file) for name, module in self._modules.items() if (file := getattr(module, "__file__", None))}

    def load(self, name: str) -> ModuleType:
        """Import one kernel file by its dotted name."""
        with self.entered():
            return importlib.import_module(name)

    def inside(self, function: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
        """The function with `fixed` keywords, called while this world's modules are in place; its signature is kept."""
        bound = functools.partial(function, **fixed) if fixed else function

        def call(*args: Any, **keywords: Any) -> Any:
            with self.entered():
                return bound(*args, **keywords)

        functools.update_wrapper(call, function)
        call.__wrapped__ = bound  # type: ignore[attr-defined]  # what inspect.signature follows
        return call

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Put this world's modules into sys.modules, and afterwards everything back as it was."""
        self._outside.append(_taken_out(self._root))
        sys.modules.update(self._modules)
        sys.meta_path.insert(0, self._finder)
        try:
            yield
        finally:
            sys.meta_path.remove(self._finder)
            self._modules = _taken_out(self._root)
            sys.modules.update(self._outside.pop())

    @contextmanager
    def left(self) -> Iterator[None]:
        """Inside `entered`: everything as it was outside, for a function of the real project."""
        inside = _taken_out(self._root)
        sys.meta_path.remove(self._finder)
        sys.modules.update(self._outside.pop())
        try:
            yield
        finally:
            self._outside.append(_taken_out(self._root))
            sys.modules.update(inside)
            sys.meta_path.insert(0, self._finder)

    def add(self, name: str, kind: type[ModuleType] = ModuleType, **attributes: Any) -> None:
        """Put a stand-in in place, with these attributes; the packages above it must be there."""
        module = kind(name, "A stand-in of m3check.")
        module.__path__ = []
        module.__dict__.update(attributes)
        self._modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(self._modules[parent], child, module)


class World(Modules):
    """vLLM's modules, for the kernel files below `vllm/models/minimax_m3/*/ops`."""

    def __init__(self, folder: Path, arch: Arch, pdl: bool, further: tuple[str, ...] = ()) -> None:
        """`further` are beginnings of names of more modules that are executed."""
        import triton
        import triton.language as tl

        kernels = "vllm.models.minimax_m3."
        super().__init__(
            "vllm", folder, lambda name: (name.startswith(kernels) and ".ops." in name) or name.startswith(further)
        )
        for package in ("vllm", "vllm.utils", "vllm.models", "vllm.models.minimax_m3"):
            self.add(package)
        for branch in ("amd", "common", "nvidia"):
            self.add(f"vllm.models.minimax_m3.{branch}")
            self.add(f"vllm.models.minimax_m3.{branch}.ops")
        self._platform = Platform(arch, pdl)
        self.add("vllm.platforms", current_platform=self._platform)
        self.add(
            "vllm.platforms.rocm",
            on_gfx942=lambda: arch.name == "gfx942",
            on_gfx950=lambda: arch.name == "gfx950",
            on_mi3xx=lambda: arch.name in ("gfx942", "gfx950"),
        )
        log2e = 1.4426950408889634
        self.add("vllm.triton_utils", triton=triton, tl=tl, HAS_TRITON=True, LOG2E=log2e, LOGE2=1 / log2e)
        self.add(
            "vllm.utils.math_utils",
            cdiv=lambda a, b: -(a // -b),
            round_up=lambda a, b: -(a // -b) * b,
            next_power_of_2=lambda n: 1 << max(0, n - 1).bit_length(),
        )
        self.add("vllm.utils.platform_utils", num_compute_units=lambda device_id=0: arch.multiprocessors)

    @property
    def pdl(self) -> bool:
        """Whether `is_arch_support_pdl` is answered with yes."""
        return self._platform._pdl

    def dependent_launch(self, on: bool) -> None:
        """Answer `is_arch_support_pdl` so from now on; vLLM's wrappers ask at every call."""
        self._platform._pdl = on


def _taken_out(root: str) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == root or name.startswith(f"{root}.")]
    return {name: sys.modules.pop(name) for name in names}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds a project's executed modules in one folder, and nothing else of it anywhere."""

    def __init__(self, root: str, folder: Path, executed: Callable[[str], bool]) -> None:
        self._root, self._folder, self._executed = root, folder, executed

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != self._root:
            return None
        file = self._folder.joinpath(*fullname.split(".")).with_suffix(".py")
        if self._executed(fullname) and file.is_file():
            return importlib.util.spec_from_file_location(fullname, file, loader=_SourceLoader(fullname, str(file)))
        raise ModuleNotFoundError(f"m3check has no stand-in for {fullname}", name=fullname)


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Compiles the file itself: a .pyc beside a file whose hash was checked would run unchecked."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)
