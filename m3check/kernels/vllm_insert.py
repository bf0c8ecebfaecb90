"""vLLM's compiled op that norms, rotates and inserts: found beside an installed vLLM, called by the schema it has there.

Versions differ in how many arguments it takes (0.26 brought `skip_index_branch`, 0.28 the fp8 queries); a case that needs
one which is not there is refused. Facts: vLLM 0.33.0, `_custom_ops.py`, and the op's checks of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from m3check.arch import Arch
from m3check.types import Case, Evidence, Kernel, M3CheckError, Profile

OP = "qknorm_rope_insert"
NAME = "fused_minimax_m3_qknorm_rope_kv_insert"
LIBRARIES = ("_C_stable_libtorch*.so", "_C.*.so", "_C_*.so")
"""What registers `torch.ops._C`, below vllm/."""


def libraries(folder: Path) -> list[Path]:
    """The compiled libraries of a vLLM in a folder."""
    return sorted({path for pattern in LIBRARIES for path in (folder / "vllm").glob(pattern)})


def missing(folder: Path) -> str | None:
    """Why the op is not to be had from there."""
    if libraries(folder):
        return None
    return (
        f"vLLM norms, rotates and inserts in a compiled op, torch.ops._C.{NAME}: it needs a GPU and an installed vLLM "
        "(--kernels vllm); the kernel files of a wheel or a checkout do not have it"
    )


def kernel(provider: str, folder: Path) -> Kernel:
    """The op of an installed vLLM; raises M3CheckError where its libraries do not load or lack it."""
    import torch

    try:
        for path in libraries(folder):
            torch.ops.load_library(str(path))
        found = getattr(torch.ops._C, NAME)
    except (OSError, AttributeError, RuntimeError) as error:
        raise M3CheckError(f"torch.ops._C.{NAME} cannot be loaded from {folder / 'vllm'}: {error}") from error
    return Kernel(provider, OP, NAME, Profile(), adapted(found))


def takes(op: Any) -> frozenset[str]:
    """The arguments of a torch op, by name."""
    return frozenset(argument.name for argument in op.default._schema.arguments)


def adapted(op: Any) -> Callable[..., None]:
    """A torch op of that name under the keywords of the contract: it sees an fp8 main cache as bytes."""
    known = takes(op)

    def insert(**keywords: Any) -> None:
        import torch

        cache = keywords["kv_cache"]
        if cache is not None and cache.element_size() == 1:
            keywords["kv_cache"] = cache.view(torch.uint8)
        op(**{name: value for name, value in keywords.items() if name in known})

    insert.takes = known  # type: ignore[attr-defined]
    return insert


def refusal(case: Case, arch: Arch, evidence: Evidence, loaded: Kernel | None, kv_layout: str) -> str | None:
    """Why the op cannot run a case; `loaded` is None while nobody has asked it for its arguments."""
    if evidence != "device":
        return f"{NAME} is compiled: it runs on a GPU only"
    for dtype in (case.cache_dtype, case.index_cache_dtype):
        if dtype.endswith("fnuz") != (arch.name == "gfx942") and dtype.startswith("fp8"):
            return f"{NAME} has no {dtype} on {arch.name}"
    if kv_layout != "packed" and case.layer != "dense":
        return f"{NAME} of this version inserts into caches of another layout: [page, 2, 128, Hkv, D]"
    known = getattr(loaded.function, "takes", None) if loaded else None
    needed = {"skip_index_branch": case.layer == "skip_index", "q_fp8_out": case.queries in ("fp8", "both")}
    for name, wanted in needed.items():
        if wanted and known is not None and name not in known:
            return f"{NAME} of this version takes no {name}"
    return None
