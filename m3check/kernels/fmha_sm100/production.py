"""What vLLM's dispatch runs on SM100 and SM103: for each case and op, MSA's kernel where vLLM selects it, else Triton's.

vLLM selects MSA by the length of id lists and the dtypes of caches. A case beyond what MSA's kernels take at all (another
head_dim, say), which no model of production has, stays with Triton.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from m3check.arch import Arch
from m3check.kernels import vllm_layer
from m3check.kernels.fmha_sm100 import (
    ARCHS,
    PROFILES,
    adapted,
    index_decode,
    index_topk,
    refusal,
    sparse_attn,
)
from m3check.kernels.fmha_sm100 import layer as msa_layer
from m3check.kernels.fmha_sm100.interface import Interface, imported
from m3check.kernels.fmha_sm100.locate import beside, warnings
from m3check.kernels.library import Clock, with_regular_strides
from m3check.kernels.provider import Loaded, with_chains
from m3check.types import OPS, Case, Evidence, Kernel

SINCE = (0, 27)
"""The first vLLM whose indexer selects MSA where its kernels run; before, it also did where they fail."""

LAYER = "indexer"
INDEX = ("index_score", "index_topk", "index_decode")
"""What MSA's indexer runs, all of it or nothing."""

TRITON_SCORED = "minimax_m3_index_decode_score + sparse_topk_select"


def there(folder: Path, version: str, arch: Arch, evidence: Evidence) -> bool:
    """Whether production's pair can run: the GPU is the one, the vLLM in a folder is whole and its version selects MSA."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    recent = numbers is None or (int(numbers[1]), int(numbers[2])) >= SINCE
    return evidence == "device" and arch.name in ARCHS and recent and beside(folder, version) is not None


def takes(op: str, case: Case) -> bool:
    """Whether vLLM selects MSA for an op (never a chain) of a case, and MSA can run it."""
    if op == "sparse_attn_decode":
        return False  # CUTLASS decode runs on request only: provider fmha_sm100
    if op == "index_decode":  # Triton scores where the tile is too wide for CuteDSL
        wide = index_decode.too_wide(case)
        return index_topk.refusal(case) is None and (wide or refusal(op, case) is None)
    return case.topk in _lists(op) and refusal(op, case) is None


def mixes(case: Case) -> bool:
    """Whether the prefill of a decode op's rows is another implementation than the op's own."""
    prefill: Mapping[str, tuple[str, ...]] = {
        "index_decode_score": ("index_score",),
        "sparse_attn_decode": ("sparse_attn",),
        "decode": OPS["prefill"].chain,
    }
    return any(takes(op, case) for op in prefill.get(case.op, ()))


def telling(case: Case) -> bool:
    """Whether a case should show that both agree: where they attend, one with scales, which MSA is not given."""
    return mixes(case) and (case.scales != "none" or "out" not in OPS[case.op].outputs)


def _lists(op: str) -> tuple[int, ...]:
    return sparse_attn.SLOTS if op == "sparse_attn" else (index_topk.SLOTS,)


@dataclass(frozen=True)
class Dispatch:
    """The kernels of one provider, chosen case by case."""

    triton: Mapping[str, Kernel]
    """Triton's, by op, without chains."""
    msa: Mapping[str, Kernel]
    """MSA's, by op; `index_decode` scored by CuteDSL."""
    wide: Kernel | None
    """`index_decode` scored by Triton."""
    missing: Mapping[str, str]
    layer: Kernel | None = None
    """vLLM's classes of a layer, with Triton's kernels."""

    @classmethod
    def of(cls, triton: Mapping[str, Kernel], interface: Interface, provider: str) -> Dispatch:
        """From Triton's kernels and MSA's functions; prefill attention ignores the scales it is given, as in production."""
        msa, missing = adapted(interface, provider)
        wide = None
        if "index_topk" in msa and "index_decode_score" in triton:
            function = with_regular_strides(index_decode.adapter(interface, triton["index_decode_score"].function))
            wide = Kernel(provider, "index_decode", TRITON_SCORED, PROFILES["index_decode"], function)
        layer = triton.get(LAYER)
        if layer is not None and isinstance(layer.function, vllm_layer.LayerMaker):
            sentence = interface.lacking(*msa_layer.NEEDS)
            if sentence is None:
                msa_layer.put_in(layer.function.world, interface)
            else:
                missing[LAYER] = f"{' + '.join(vllm_layer.MSA_NAMES)} cannot run: {sentence}"
        else:
            layer = None
        return cls({op: k for op, k in triton.items() if not OPS[op].chain}, msa, wide, missing, layer)

    def kernels(self, case: Case) -> dict[str, Kernel]:
        """All kernels that a case's ops run, chains included."""
        chosen = {op: self._kernel(op, case) for op in {**self.triton, **self.msa}}
        made = with_chains({op: kernel for op, kernel in chosen.items() if kernel is not None}, self.missing)[0]
        if self.layer is not None and (mixed := made.pop(LAYER, None)) is not None:
            layer = self._layer(self.layer.function, mixed, case)
            made |= {LAYER: layer} if layer is not None else {}
        return made

    def _layer(self, maker: Any, mixed: Kernel, case: Case) -> Kernel | None:
        """vLLM's classes of a layer for a case: those of MSA where vLLM selects them and their kernels run."""
        msa = all(takes(op, case) for op in INDEX), takes("sparse_attn", case)
        if any(msa) and LAYER in self.missing:
            return None
        chosen = replace(maker, msa=msa)
        return replace(mixed, name=" + ".join(chosen.names), function=chosen)

    def _kernel(self, op: str, case: Case) -> Kernel | None:
        if not takes(op, case):
            return self.triton.get(op)
        if op == "index_decode" and index_decode.too_wide(case):
            return self.wide
        return self.msa.get(op)  # where MSA's does not import, production fails: Triton must not stand in for it


def with_msa(loaded: Loaded, folder: Path) -> Loaded:
    """A provider of Triton's kernels and, from the same folder that holds vllm/, MSA's where production selects them."""
    found = beside(folder, loaded.description["version"])
    assert found is not None
    clock = Clock()
    chosen = Dispatch.of(loaded.kernels, imported(found).timed(clock), loaded.spec.text)
    refusal_of_triton = loaded.refusal

    def refusal(op: str, case: Case) -> str | None:
        return None if takes(op, case) else refusal_of_triton(op, case)

    note = "MSA's kernels where vLLM selects them on this target, the Triton ones elsewhere"
    return replace(
        loaded,
        missing={**chosen.missing, **loaded.missing},
        description={**loaded.description, "note": note},
        warnings=(*loaded.warnings, *warnings()),
        refusal=refusal,
        on_compile=clock.listen,
        produced=chosen.kernels,
    )
