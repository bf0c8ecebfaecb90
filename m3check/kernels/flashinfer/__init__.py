"""FlashInfer's msa_ops for SM120 and SM121: block scores, selection and attention in CuTe-DSL, which only those GPUs run.

The adapters call it as vLLM does after 0.33.0. The interface is that of flashinfer-python 0.7.2.post1; before 0.6.18
msa_topk_select has no bounds by token, and raises.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3check.arch import Arch
from m3check.kernels.flashinfer import attention, index
from m3check.kernels.library import Clock, with_regular_strides
from m3check.kernels.provider import Loaded, Spec, index_dtypes, with_chains
from m3check.types import OPS, Case, Evidence, Kernel, M3CheckError, Profile

ARCHS = ("sm120", "sm121")

SELECTION = Profile(id_order="ascending", odd_scores=frozenset(), dead_ids="any")
ATTENTION = Profile(dead_rows="any", id_lists=frozenset({"ascending", "short"}), dequantise="folded")


@dataclass(frozen=True)
class Interface:
    """The functions of flashinfer.msa_ops that the adapters call."""

    msa_proxy_score: Callable[..., Any]
    msa_topk_select: Callable[..., Any]
    msa_sparse_attention: Callable[..., Any]
    msa_sparse_decode_attention: Callable[..., Any]

    @classmethod
    def of(cls, module: object) -> Interface:
        """From anything that has the functions by their own names; raises M3CheckError for what is missing."""
        lost = [name for name in cls.__annotations__ if not hasattr(module, name)]
        if lost:
            raise M3CheckError(f"this flashinfer.msa_ops has no {', '.join(lost)}; flashinfer-python 0.7.2 has")
        return cls(**{name: getattr(module, name) for name in cls.__annotations__})

    def timed(self, clock: Clock) -> Interface:
        """The same functions; a clock stops while one of them, which may compile, is called."""
        return Interface(**{name: clock.stopped(getattr(self, name)) for name in self.__annotations__})


def prepare(spec: Spec, offline: bool) -> tuple[str, ...]:
    """See that the package is there, without importing it."""
    _locate(spec)
    return ()


def load(spec: Spec, arch: Arch, evidence: Evidence, offline: bool) -> Loaded:
    """Import msa_ops; only on its own GPU."""
    sentence = _wrong_machine(arch, evidence)
    if sentence is not None:
        return Loaded(spec, {}, dict.fromkeys(OPS, sentence))
    path, version = _locate(spec)
    if spec.path and path not in sys.path:
        sys.path.insert(0, path)
    try:
        module = importlib.import_module("flashinfer.msa_ops")
    except Exception as error:
        raise M3CheckError(f"flashinfer.msa_ops does not import: {type(error).__name__}: {error}") from error
    clock = Clock()
    kernels, missing = with_chains(adapted(Interface.of(module).timed(clock), spec.text), {})
    description = {"version": version, "from": path}
    return Loaded(spec, kernels, missing, description, refusal=refusal, on_compile=clock.listen)


def refuses(spec: Spec, case: Case, arch: Arch, evidence: Evidence) -> str | None:
    """Why the kernels cannot run a case here."""
    sentence = _wrong_machine(arch, evidence)
    steps = OPS[case.op].chain or (case.op,)
    return sentence or next((found for op in steps if (found := refusal(op, case))), None)


def compiles(spec: Spec) -> bool:
    """Whether it launches Triton kernels: no."""
    return False


def adapted(interface: Interface, provider: str) -> dict[str, Kernel]:
    """A kernel for each op of block-sparse attention."""
    made: Mapping[str, tuple[str, Profile, Any]] = {
        "index_score": ("msa_proxy_score", Profile(), index.score(interface)),
        "index_topk": ("msa_topk_select", SELECTION, index.topk(interface)),
        "index_decode_score": ("msa_proxy_score", Profile(forced_scores=False), index.decode_score(interface)),
        "index_decode": ("msa_proxy_score + msa_topk_select", SELECTION, index.decode(interface)),
        "sparse_attn": ("msa_sparse_attention", ATTENTION, attention.prefill(interface)),
        "sparse_attn_decode": ("msa_sparse_decode_attention", ATTENTION, attention.decode(interface)),
    }
    return {
        op: Kernel(provider, op, name, profile, with_regular_strides(function), library=True)
        for op, (name, profile, function) in made.items()
    }


def refusal(op: str, case: Case) -> str | None:
    """Why the kernel of an op (never a chain) cannot run a case."""
    if op in ("index_score", "index_decode_score"):
        return index.score_refusal(case, index_dtypes(case))
    if op == "index_topk":
        return index.topk_refusal(case)
    if op == "index_decode":
        return index.topk_refusal(case) or index.score_refusal(case, index_dtypes(case))
    if op in ("sparse_attn", "sparse_attn_decode"):
        return attention.refusal(op, case)
    return f"flashinfer.msa_ops has no {op}"


def _wrong_machine(arch: Arch, evidence: Evidence) -> str | None:
    if arch.name not in ARCHS:
        return f"m3check runs flashinfer.msa_ops on SM120 and SM121 only; {arch.name} is neither"
    if evidence != "device":
        return f"needs an {arch.name.upper()} GPU with FlashInfer installed: msa_ops is CuTe-DSL, which no interpreter runs"
    return None


def _locate(spec: Spec) -> tuple[str, str]:
    """(the folder that holds flashinfer/, its version); raises M3CheckError where there is none with msa_ops."""
    if spec.path:
        if (Path(spec.path) / "flashinfer/msa_ops/__init__.py").is_file():
            return spec.path, "unknown"
        raise M3CheckError(f"flashinfer:PATH: {spec.path} has no flashinfer/msa_ops; wanted a checkout or site-packages")
    found = importlib.util.find_spec("flashinfer")
    for folder in (found.submodule_search_locations or []) if found else []:
        if (Path(folder) / "msa_ops/__init__.py").is_file():
            return str(Path(folder).parent), importlib.metadata.version("flashinfer-python")
    lacks = "has no msa_ops, which came with 0.6.16" if found else "is not installed here"
    raise M3CheckError(f"flashinfer {lacks}; pip install flashinfer-python, or name a checkout (flashinfer:PATH)")
