"""WHO IS TESTED: the providers of kernels, by name.

Nothing heavy is imported here; `load` imports a provider's library, and `m3check list` never gets there.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
from types import ModuleType

from m3check.arch import Arch
from m3check.kernels.project import SGLANG, VLLM
from m3check.kernels.provider import Loaded, Provider, Spec
from m3check.types import Case, Evidence, M3CheckError

__all__ = [
    "PROVIDERS",
    "Loaded",
    "Provider",
    "Spec",
    "absent",
    "compiles",
    "load",
    "parse_spec",
    "prepare",
    "refuses",
    "suits",
]

PROVIDERS: tuple[Provider, ...] = (
    Provider("triton", ("triton",), "m3check's own Triton kernels", "triton", "m3check.kernels.ours", "triton"),
    Provider(
        "vllm",
        ("vllm", "vllm==X.Y.Z", "vllm:PATH"),
        "vLLM's MiniMax-M3 Triton kernels: installed, out of a published wheel, or at PATH (a checkout, a site-packages "
        "folder or a wheel file)",
        "triton; for vllm==X.Y.Z pip and the network once, then the cache",
        "m3check.kernels.vllm",
        "vllm",
        VLLM,
    ),
    Provider(
        "sglang",
        ("sglang", "sglang==X.Y.Z", "sglang:PATH"),
        "SGLang's MiniMax-M3 Triton kernels: installed, out of a published wheel, or at PATH (a checkout, a site-packages "
        "folder or a wheel file)",
        "triton; for sglang==X.Y.Z pip and the network once, then the cache",
        "m3check.kernels.sglang",
        "sglang",
        SGLANG,
    ),
    Provider(
        "sglang_fused",
        ("sglang_fused", "sglang_fused==X.Y.Z", "sglang_fused:PATH"),
        "SGLang's kernels that score and attend in one pass, for layers whose index head has values; found as sglang's are",
        "as sglang",
        "m3check.kernels.sglang",
        project=SGLANG,
    ),
    Provider(
        "fmha_sm100",
        ("fmha_sm100", "fmha_sm100:PATH"),
        "MSA's CUTLASS and CuteDSL kernels for SM100 and SM103, which production runs there: of an installed vLLM or MSA, "
        "or at PATH (a checkout of vllm-project/MSA, a folder that holds vllm/)",
        "an SM100 or SM103 GPU, vLLM or MSA, nvcc",
        "m3check.kernels.fmha_sm100",
    ),
    Provider(
        "flashinfer",
        ("flashinfer", "flashinfer:PATH"),
        "FlashInfer's msa_ops for SM120 and SM121: installed, or at PATH (a checkout, a site-packages folder)",
        "an SM120 or SM121 GPU, flashinfer-python 0.6.18 or newer",
        "m3check.kernels.flashinfer",
        "flashinfer-python",
    ),
    Provider(
        "user",
        ("./file.py", "package.module"),
        "your own kernels: functions named like the ops (see m3check kernels --signatures)",
        "what the file imports",
        "m3check.kernels.user",
    ),
)

_NAMED = re.compile(r"(\w+)(?:(==|:)(.*))?")
_VERSION = re.compile(r"[0-9][0-9A-Za-z.+!]*")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def parse_spec(text: str) -> Spec:
    """A provider from its command-line form; raises M3CheckError that lists the known forms."""
    name, mark, rest = match.groups(default="") if (match := _NAMED.fullmatch(text)) else ("", "", "")
    provider = next((p for p in PROVIDERS if p.name == name and name in p.grammar), None)
    if provider and not mark:
        return Spec(text, name)
    if provider and provider.project and mark == "==":
        if not _VERSION.fullmatch(rest):
            example = f"{name}=={provider.project.example}"
            raise M3CheckError(f"{text!r}: wanted a version after ==, such as {example}, got {rest!r}")
        return Spec(text, name, version=rest)
    if provider and provider.paths and mark == ":":
        if not rest:
            more = ", a site-packages folder or a wheel file" if provider.project else " or a site-packages folder"
            raise M3CheckError(f"'{name}:' lacks a path: {name}:PATH names a checkout{more}")
        return Spec(text, name, path=_absolute(rest))
    if text.endswith(".py") or "/" in text or os.sep in text:
        return Spec(text, "user", path=_absolute(text))
    if _MODULE.fullmatch(text):
        return Spec(text, "user", module=text)
    known = " · ".join(form for provider in PROVIDERS for form in provider.grammar)
    raise M3CheckError(f"unknown provider {text!r}{_meant(text)}; known: {known}")


def _meant(text: str) -> str:
    """A clause that says what was probably meant: a provider, a file or a package that is here."""
    close = difflib.get_close_matches(
        text.partition(":")[0].partition("=")[0], [p.name for p in PROVIDERS if p.name != "user"]
    )
    guesses = close[:1]
    if text and os.path.isfile(f"{text}.py"):
        guesses.insert(0, f"./{text}.py")
    elif text and os.path.isdir(text):
        guesses.insert(0, f"a file in that folder, as {os.path.join('.', text, 'NAME.py')}")
    return f" (did you mean {guesses[0]}?)" if guesses else ""


def prepare(spec: Spec, offline: bool = False) -> tuple[str, ...]:
    """Make a provider's files available (fetch a wheel's files, once); raises M3CheckError where it cannot be found.

    Imports none of its code, so that a run can fail early, and workers need no network. Returns warnings.
    """
    warnings: tuple[str, ...] = _module(spec).prepare(spec, offline)
    return warnings


def absent(provider: Provider) -> str | None:
    """Why what a provider's bare name means is not here; None where it is, or where that cannot be said."""
    if provider.name not in provider.grammar:
        return None
    try:
        prepare(parse_spec(provider.name), offline=True)
    except M3CheckError as error:
        return str(error)
    return None


def load(spec: Spec, arch: Arch, evidence: Evidence, offline: bool = False) -> Loaded:
    """Import a provider's kernels, in a worker; raises M3CheckError that says what is wrong with them."""
    loaded: Loaded = _module(spec).load(spec, arch, evidence, offline)
    return loaded


def refuses(spec: Spec, case: Case, arch: Arch, evidence: Evidence = "interpreted") -> str | None:
    """Why a provider cannot run a case, as far as can be told without importing its code or connecting; else None."""
    sentence: str | None = _module(spec).refuses(spec, case, arch, evidence)
    return sentence


def suits(spec: Spec, invariant: str, case: Case, arch: Arch, evidence: Evidence) -> bool:
    """Whether a provider would rather have an invariant shown on a case like this one than on cheaper ones."""
    module = _module(spec)
    return bool(module.suits(spec, invariant, case, arch, evidence)) if hasattr(module, "suits") else False


def compiles(spec: Spec) -> bool:
    """Whether a provider may launch Triton kernels, as far as can be told without importing its code."""
    module = _module(spec)
    return bool(module.compiles(spec)) if hasattr(module, "compiles") else True


def _module(spec: Spec) -> ModuleType:
    return importlib.import_module(next(p.module for p in PROVIDERS if p.name == spec.provider))


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
