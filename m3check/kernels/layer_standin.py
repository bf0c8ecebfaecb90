"""What vLLM's implementation classes of one M3 layer import besides kernels: configuration, the base of metadata builders.

Classes that only annotate or are inherited from are empty. What computes (how a batch is split, how many tokens were
computed before) is written here anew, after vLLM 0.24.0 to 0.33.0; everything else is in vLLM's own files.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from m3check.arch import Arch
from m3check.kernels.standin import Platform, World

if TYPE_CHECKING:
    from torch import Tensor

M3 = "vllm.models.minimax_m3"
FILES = (f"{M3}.common.indexer", f"{M3}.common.sparse_attention")
"""The modules with the implementation classes and with vLLM's own selection of one."""
MSA_FILES = (f"{M3}.nvidia.indexer_msa", f"{M3}.nvidia.sparse_attention_msa")
"""Those with the classes for family 100, which call fmha_sm100."""

Metadata = TypeVar("Metadata")


class Builder(Generic[Metadata]):
    """Base of a metadata builder."""

    reorder_batch_threshold: int | None = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        self.kv_cache_spec, self.layer_names = kv_cache_spec, layer_names
        self.vllm_config, self.device = vllm_config, device

    def _init_reorder_batch_threshold(self, threshold: int = 1, supports_spec_as_decode: bool = False, **_: Any) -> None:
        drafts = self.vllm_config.speculative_config.num_speculative_tokens if supports_spec_as_decode else 0
        self.reorder_batch_threshold = max(threshold, 1 + drafts)


class Impl(Generic[Metadata]):
    """Base of an attention implementation."""


class Common:
    """What is common to the metadata of all cache groups: one batch."""

    def __init__(self, starts: Tensor, starts_host: Tensor, lengths: Tensor, lengths_host: Tensor, **more: Any) -> None:
        self.query_start_loc, self.query_start_loc_cpu = starts, starts_host
        self.seq_lens, self.seq_lens_cpu_upper_bound, self.seq_lens_cpu = lengths, lengths_host, lengths_host
        self.num_reqs = len(lengths_host)
        self.__dict__.update(more)

    def compute_num_computed_tokens(self) -> Tensor:
        """Tokens before the queries of each request, on the device."""
        return self.seq_lens - (self.query_start_loc[1:] - self.query_start_loc[:-1])


def split(common: Any, decode_threshold: int = 1, require_uniform: bool = False, **_: Any) -> tuple[int, int, int, int]:
    """(decodes, prefills, decode tokens, prefill tokens) of a batch that has its decodes first.

    With `require_uniform` a decode is as long as the first request (or has no query at all, as padding has).
    """
    starts = common.query_start_loc_cpu.tolist()
    lengths = [b - a for a, b in itertools.pairwise(starts)]
    decodes = 0
    if lengths and lengths[0] <= decode_threshold:
        for length in lengths:
            alike = length in (lengths[0], 0) if require_uniform else length <= decode_threshold
            if not alike:
                break
            decodes += 1
    return decodes, len(lengths) - decodes, starts[decodes], starts[-1] - starts[decodes]


class _Names(ModuleType):
    """A module of classes that are only named: each is made, empty, when it is first asked for."""

    def __getattr__(self, name: str) -> Any:
        if not name[:1].isupper():
            raise AttributeError(f"m3check's stand-in for {self.__name__} has no {name!r}")
        made = type(name, (), {"__doc__": "A stand-in of m3check.", "__module__": self.__name__})
        setattr(self, name, made)
        return made


class LayerPlatform(Platform):
    """What the choice of an implementation asks of the platform besides."""

    def is_device_capability_family(self, capability: int, device_id: int = 0) -> bool:
        """Whether the target is of a family such as 100."""
        return self._arch.vendor == "nvidia" and self._arch.capability[0] == capability // 10

    def supports_fp8(self) -> bool:
        """Whether the target multiplies fp8."""
        return self._arch.capability >= (8, 9) if self._arch.vendor == "nvidia" else bool(self._arch.fp8)

    def is_fp8_fnuz(self) -> bool:
        """Whether the target's fp8 dialect is fnuz."""
        return self._arch.name == "gfx942"

    def fp8_dtype(self) -> Any:
        """The target's e4m3."""
        import torch

        return torch.float8_e4m3fnuz if self.is_fp8_fnuz() else torch.float8_e4m3fn


class _Logger:
    """Says nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class LayerWorld(World):
    """One version's modules, the files of its implementation classes among them."""

    def __init__(self, folder: Path, arch: Arch, pdl: bool) -> None:
        super().__init__(folder, arch, pdl, (*FILES, *MSA_FILES, f"{M3}.nvidia.msa_cutlass_sparse_decode"))
        self._platform = LayerPlatform(arch, pdl)
        self.add("vllm.platforms", current_platform=self._platform)
        self.config: Any = None
        """What `get_current_vllm_config` answers."""
        self.attn_metadata: dict[str, Any] = {}
        """What the forward context holds, by layer."""
        for package in ("vllm.v1", "vllm.v1.attention", "vllm.model_executor", "vllm.model_executor.layers"):
            self.add(package)
        self._names("vllm.config", get_current_vllm_config=lambda: self.config)
        self._names("vllm.config.attention")
        self._names("vllm.config.cache")
        self._names("vllm.distributed", get_tensor_model_parallel_world_size=lambda: 1)
        self._names("vllm.forward_context", get_forward_context=lambda: SimpleNamespace(attn_metadata=self.attn_metadata))
        self._names("vllm.logger", init_logger=lambda name: _Logger())
        self.add("vllm.utils.torch_utils", get_dtype_size=None, nvfp4_kv_cache_full_dim=None)  # of caches no case has
        self._names("vllm.model_executor.layers.attention_layer_base")
        self._names(
            "vllm.v1.attention.backend",
            AttentionMetadataBuilder=Builder,
            AttentionImplBase=Impl,
            CommonAttentionMetadata=Common,
            AttentionCGSupport=SimpleNamespace(UNIFORM_BATCH="uniform batch"),
        )
        self.add("vllm.v1.attention.backends")
        self._names(
            "vllm.v1.attention.backends.utils",
            split_decodes_and_prefills=split,
            get_kv_cache_layout=lambda: "HND",
        )
        self._names(
            "vllm.v1.kv_cache_interface",
            is_quantized_kv_cache=lambda word: word.startswith(("fp8", "nvfp4")),
            get_kv_quant_mode=lambda word: SimpleNamespace(is_nvfp4=word.startswith("nvfp4")),
            SparseCacheRole=SimpleNamespace(INDEXER="indexer"),
        )
        self.aiter = False
        """Whether AITER and its shuffled cache layout are on: builders then keep what its attention reads as well."""
        asked = SimpleNamespace(is_enabled=lambda: self.aiter, is_shuffle_kv_cache_enabled=lambda: self.aiter)
        self._names("vllm._aiter_ops", rocm_aiter_ops=asked)

    def only_named(self, *modules: str) -> None:
        """Let classes of these modules be named though their files are not executed."""
        for module in modules:
            self._names(module)

    def _names(self, name: str, **attributes: Any) -> None:
        self.add(name, kind=_Names, **attributes)
