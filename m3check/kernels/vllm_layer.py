"""vLLM's own indexer and attention classes of one layer, as an implementation of the op `indexer`.

`MiniMaxM3IndexerTritonImpl`, `MiniMaxM3SparseTritonImpl` (or, on family 100, those that call MSA) and their metadata
builders, executed out of a wheel beside stand-ins for what they inherit from, so that mistakes between kernels are seen,
such as a wrong layout of the buffer that hands ids over. That buffer is allocated as the version's own model does, which is
read from its source.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from m3check.arch import Arch
from m3check.kernels.layer_standin import FILES, MSA_FILES, Common, LayerWorld
from m3check.kernels.locate import TREE
from m3check.kernels.serving import Batch, Buffers, Figures, Layout, Tensors
from m3check.types import BLOCK, Case, Kernel, M3CheckError

if TYPE_CHECKING:
    from torch import Tensor

LAYER = "layers.0.self_attn.attn"

NAMES = ("MiniMaxM3IndexerTritonImpl", "MiniMaxM3SparseTritonImpl")
MSA_NAMES = ("MiniMaxM3IndexerMSAImpl", "MiniMaxM3SparseMSAImpl")
"""The indexer's class and attention's."""


def missing(folder: Path) -> str | None:
    """The sentence why a version's classes cannot be loaded; None where they can."""
    for name in ("common/indexer.py", "common/sparse_attention.py"):
        if not (folder / TREE / name).is_file():
            return f"this vLLM has no {name}, which has the implementation classes"
    return None


def refusal(arch: Arch, case: Case) -> str | None:
    """Why the classes cannot run a case that the kernels can."""
    fnuz = arch.name == "gfx942"
    for word in (case.cache_dtype, case.index_cache_dtype):
        if word.startswith("fp8") and word.endswith("fnuz") != fnuz:
            return f"vLLM's layer views an fp8 cache in the dialect of {arch.name}, which is not that of {word}"
    return None


def buffer_layout(folder: Path, arch: Arch) -> Layout:
    """How the model of this version allocates the id buffer: by its first dimension, tokens or heads."""
    path = folder / TREE / ("amd" if arch.vendor == "amd" else "nvidia") / "model.py"
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise M3CheckError(f"{path} says nothing of the id buffer: {error}") from error
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call) or len(node.value.args) != 3:
            continue
        if ast.unparse(node.targets[0]) == "self.topk_indices_buffer":
            return "head" if "head" in ast.unparse(node.value.args[0]) else "token"
    raise M3CheckError(f"{path} allocates no topk_indices_buffer of three dimensions")


def put_in(kernels: dict[str, Kernel], absent: dict[str, str], folder: Path, arch: Arch, pdl: bool) -> None:
    """Put a version's own layer in the place of the host code that m3check would have around its kernels."""
    if "indexer" not in kernels:
        return
    sentence = missing(folder)
    if sentence:
        del kernels["indexer"]
        absent["indexer"] = sentence
        return
    world = LayerWorld(folder, arch, pdl)
    world.aiter = arch.vendor == "amd"  # not its attention, which is in no wheel: what the builders make for it
    maker = LayerMaker(world, buffer_layout(folder, arch))
    kernels["indexer"] = replace(kernels["indexer"], name=" + ".join(NAMES), function=maker)


@dataclass(frozen=True)
class LayerMaker:
    """Makes layers of one version on one target."""

    world: LayerWorld
    layout: Layout
    msa: tuple[bool, bool] = (False, False)
    """Whether the indexer and attention are MSA's; then the world has what they import (fmha_sm100.layer)."""

    @property
    def names(self) -> tuple[str, str]:
        """The classes of the indexer and of attention."""
        index, attend = (MSA_NAMES[i] if of_msa else NAMES[i] for i, of_msa in enumerate(self.msa))
        return index, attend

    def __call__(self, figures: Figures, buffers: Buffers) -> Layer:
        """A layer that keeps the id buffer; these classes have scores of their own, or none that last."""
        return Layer(self, figures, buffers)


class Layer:
    """One attention layer with its indexer."""

    keeps_scores = False

    def __init__(self, maker: LayerMaker, figures: Figures, buffers: Buffers) -> None:
        self._world, self._figures, self._buffers = maker.world, figures, buffers
        world, names = maker.world, maker.names
        world.config = _config(figures)
        index_file, attend_file = (world.load(MSA_FILES[i] if of_msa else FILES[i]) for i, of_msa in enumerate(maker.msa))
        with world.entered():
            heads = {"index": 1, "main": figures.kv_heads}
            specs = {
                name: SimpleNamespace(block_size=BLOCK, num_kv_heads=count, head_size=figures.head_dim)
                for name, count in heads.items()
            }
            index_class, attend_class = getattr(index_file, names[0]), getattr(attend_file, names[1])
            self._index_builder = _builder(index_file, "Indexer", maker.msa[0])(
                specs["index"], [f"{LAYER}.index_cache"], world.config, figures.device
            )
            self._main_builder = _builder(attend_file, "Sparse", maker.msa[1])(
                specs["main"], [LAYER], world.config, figures.device
            )
            self._indexer = index_class(
                num_kv_heads=figures.kv_heads,
                scale=figures.sm_scale,
                topk_blocks=figures.topk,
                sparse_block_size=BLOCK,
                num_index_heads=figures.kv_heads,
                index_head_dim=figures.head_dim,
                prefix=LAYER,
                init_blocks=figures.init_blocks,
                local_blocks=figures.local_blocks,
                cache_config=None,
                indexer_kv_dtype="fp8" if figures.index_dtype.startswith("fp8") else "bf16",
                topk_indices_buffer=buffers.ids,
            )
            self._attention = attend_class(
                figures.heads,
                figures.head_dim,
                figures.sm_scale,
                figures.kv_heads,
                _cache_word(figures.cache_dtype),
                topk_blocks=figures.topk,
                sparse_block_size=BLOCK,
            )

    def build(self, batch: Batch) -> tuple[Any, Any]:
        """What vLLM's builders make of a batch, each with the block table of its cache group."""
        with self._world.entered():
            return (
                self._index_builder.build(0, _common(batch, batch.index_table)),
                self._main_builder.build(0, _common(batch, batch.main_table)),
            )

    def forward(self, metadata: tuple[Any, Any], tensors: Tensors) -> Sequence[Tensor | None]:
        """The indexer, then attention, as the model's own forward does; returns what the indexer returned."""
        world, figures = self._world, self._figures
        world.attn_metadata = {f"{LAYER}.index_cache": metadata[0], LAYER: metadata[1]}
        self._indexer.index_cache.kv_cache = tensors.index_kv_cache
        layer = SimpleNamespace(
            layer_name=LAYER,
            topk_indices_buffer=self._buffers.ids,
            **({"_k_scale": tensors.k_scale, "_v_scale": tensors.v_scale} if tensors.k_scale is not None else {}),
        )
        with world.entered():
            returned: Sequence[Tensor | None] = self._indexer.forward(tensors.idx_q)
            cache = tensors.kv_cache
            if figures.cache_dtype.startswith("fp8"):  # vLLM's cache is bytes, which the layer views
                import torch

                cache = cache.view(torch.uint8)
            self._attention.forward(layer, tensors.q, cache, tensors.output)
        return returned


def _builder(file: Any, part: str, msa: bool) -> Any:
    """The class of a file that builds metadata; attention's Triton one has no word for that in its name."""
    kind = "MSA" if msa else "Triton" if part == "Indexer" else ""
    return getattr(file, f"MiniMaxM3{part}{kind}MetadataBuilder")


def _config(figures: Figures) -> Any:
    """The figures of a vLLM configuration that the classes read."""
    sparse = {"sparse_num_index_heads": figures.kv_heads, "sparse_topk_blocks": figures.topk}
    text = SimpleNamespace(sparse_attention_config=sparse, num_attention_heads=figures.heads)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=text, hf_text_config=text),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=figures.max_tokens),
        speculative_config=SimpleNamespace(num_speculative_tokens=figures.max_query_len - 1),
        compilation_config=SimpleNamespace(static_forward_context={}),
        attention_config=SimpleNamespace(minimax_m3_indexer_cp=False, minimax_m3_msa_decode_backend="triton"),
        cache_config=SimpleNamespace(block_size=BLOCK, cache_dtype=_cache_word(figures.cache_dtype)),
    )


def _common(batch: Batch, table: Tensor) -> Common:
    return Common(
        batch.query_starts,
        batch.query_starts_host,
        batch.seq_lens,
        batch.seq_lens_host,
        num_actual_tokens=batch.tokens,
        block_table_tensor=table,
        slot_mapping=batch.slots,
        positions=batch.positions,
        max_query_len=batch.max_query_len,
        max_seq_len=batch.max_seq_len,
    )


def _cache_word(dtype: str) -> str:
    """vLLM's word for a dtype of the main cache."""
    if not dtype.startswith("fp8"):
        return "auto"
    return "fp8_e5m2" if "e5m2" in dtype else "fp8_e4m3"
