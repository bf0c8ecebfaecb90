"""MSA's kernels for SM100, and vLLM's beside them: CUTLASS and CuteDSL, which only that GPU runs.

The files here adapt our keywords to that interface, a file an op; `interface` is what they call, so that a model of it can
stand in for the package in tests. What the kernels promise is in `profiles`, what they cannot run in each file's `refusal`.
"""

from __future__ import annotations

from collections.abc import Mapping

from m3check.arch import Arch
from m3check.kernels.fmha_sm100 import index_decode, index_score, index_topk, sparse_attn, sparse_attn_decode
from m3check.kernels.fmha_sm100.interface import Interface, imported
from m3check.kernels.fmha_sm100.locate import locate, warnings
from m3check.kernels.library import Clock, with_regular_strides
from m3check.kernels.provider import Loaded, Spec, index_dtypes, with_chains
from m3check.types import OPS, Case, Evidence, Kernel, Profile

ARCHS = ("sm100", "sm103")

SELECTION = Profile(id_order="ascending", odd_scores=frozenset(), dead_ids="any", bitwise=frozenset())
"""Ids ascend; what a NaN or an infinite score does is not said; a padded row selects as if it saw one block."""

PROFILES: Mapping[str, Profile] = {
    "index_score": Profile(),
    "index_topk": SELECTION,
    "index_decode_score": Profile(forced_scores=False),
    "index_decode": SELECTION,
    "sparse_attn": Profile(
        dead_rows="any", id_lists=frozenset({"full", "ascending", "short"}), normaliser="lse", partials="query"
    ),
    "sparse_attn_decode": Profile(
        dead_rows="any", id_lists=frozenset({"ascending", "short"}), normaliser="lse", dequantise="folded",
        queries="fp8_e4m3fn",
    ),
}  # fmt: skip


def prepare(spec: Spec, offline: bool) -> tuple[str, ...]:
    """See that the package is there, without importing it."""
    locate(spec)
    return ()


def load(spec: Spec, arch: Arch, evidence: Evidence, offline: bool) -> Loaded:
    """Import the package and take its functions; only on its own GPU."""
    sentence = _wrong_machine(arch, evidence)
    if sentence is not None:
        return Loaded(spec, {}, dict.fromkeys(OPS, sentence))
    found = locate(spec)
    clock = Clock()
    kernels, missing = adapted(imported(found).timed(clock), spec.text)
    description = {"version": found.version, "from": found.origin, "package": found.package}
    all_kernels, all_missing = with_chains(kernels, missing)
    return Loaded(spec, all_kernels, all_missing, description, warnings(), refusal, on_compile=clock.listen)


def refuses(spec: Spec, case: Case, arch: Arch, evidence: Evidence) -> str | None:
    """Why the kernels cannot run a case here."""
    sentence = _wrong_machine(arch, evidence)
    if sentence is not None:
        return sentence
    for op in OPS[case.op].chain or (case.op,):
        sentence = _scaled(op, case) or refusal(op, case)
        if sentence is not None:
            return sentence
    return None


def suits(spec: Spec, invariant: str, case: Case, arch: Arch, evidence: Evidence) -> bool:
    """Whether an invariant should rather be shown on a case: CUTLASS decode held against prefill on a scaled cache."""
    return invariant == "same_as_prefill" and case.op == "sparse_attn_decode" and case.scales != "none"


def compiles(spec: Spec) -> bool:
    """Whether it launches Triton kernels: no."""
    return False


def adapted(interface: Interface, provider: str) -> tuple[dict[str, Kernel], dict[str, str]]:
    """A kernel for each op that the interface has the functions of, and a sentence for each other op."""
    needs = {
        "index_score": (index_score.NAME, ("plan", "run")),
        "index_topk": (index_topk.NAME, ("select",)),
        "index_decode_score": (index_decode.SCORE_NAME, ("decode_score",)),
        "index_decode": (index_decode.NAME, ("decode_score", "select")),
        "sparse_attn": (sparse_attn.NAME, ("build_csr", "attend")),
        "sparse_attn_decode": (sparse_attn_decode.NAME, ("prepare_decode", "attend_decode", "plan_cache")),
    }
    lacking = {op: interface.lacking(*names) for op, (_, names) in needs.items()}
    makers = {
        "index_score": index_score.adapter,
        "index_topk": index_topk.adapter,
        "index_decode_score": index_decode.score_adapter,
        "index_decode": lambda held: index_decode.adapter(held, index_decode.score_adapter(held)),
        "sparse_attn": sparse_attn.adapter,
        "sparse_attn_decode": sparse_attn_decode.adapter,
    }
    kernels = {
        op: Kernel(provider, op, name, PROFILES[op], with_regular_strides(makers[op](interface)), library=True)
        for op, (name, _) in needs.items()
        if lacking[op] is None
    }
    missing = {op: f"{needs[op][0]} is not there: {sentence}" for op, sentence in lacking.items() if sentence is not None}
    return kernels, missing


def refusal(op: str, case: Case) -> str | None:
    """Why the kernel of an op (never a chain) cannot run a case."""
    if op == "index_score":
        return index_score.refusal(case, index_dtypes(case))
    if op == "index_topk":
        return index_topk.refusal(case)
    if op == "index_decode_score":
        return index_decode.refusal(case, index_dtypes(case))
    if op == "index_decode":
        return index_topk.refusal(case) or index_decode.refusal(case, index_dtypes(case))
    if op == "sparse_attn":
        return sparse_attn.refusal(case)
    if op == "sparse_attn_decode":
        return sparse_attn_decode.refusal(case)
    return f"fmha_sm100 has no {op}"


def _scaled(op: str, case: Case) -> str | None:
    if op != "sparse_attn" or case.scales == "none":
        return None
    return f"{sparse_attn.NAME} takes no k_scale and v_scale, so it cannot read a scaled cache"


def _wrong_machine(arch: Arch, evidence: Evidence) -> str | None:
    if arch.name not in ARCHS:
        return f"fmha_sm100's kernels are for SM100 and SM103; on {arch.name} production runs others"
    if evidence != "device":
        return (
            f"needs an {arch.name.upper()} GPU with MSA installed (vLLM has it): fmha_sm100 is CUTLASS and CuteDSL, "
            "which no interpreter runs"
        )
    return None
