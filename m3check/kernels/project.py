"""Whose published wheels hold kernels: what tells one project's files from another's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Project:
    """A distribution on the package index. Its name is also its package's and its provider's."""

    name: str
    wanted: tuple[str, ...]
    """Folders of the wheel whose .py files are read; one list for every op, so that a new op adds a line."""
    trees: tuple[str, ...]
    """Folders that may hold the kernels, the newest place first; a folder of files must have one of them."""
    first: str
    """The first published version with the kernels."""
    example: str
    """A version to name in messages."""
    part: str = ""
    """What is fetched and kept apart from the project's other files."""

    @property
    def key(self) -> str:
        """Its name in the cache and in the list of known versions."""
        return f"{self.name}+{self.part}" if self.part else self.name


VLLM = Project("vllm", ("vllm/models/minimax_m3/",), ("vllm/models/minimax_m3",), "0.24.0", "0.33.0")

VLLM_ATTENTION = Project(
    "vllm",
    ("vllm/v1/attention/ops/xpu_mla_sparse.py", "vllm/v1/attention/ops/triton_fp8_mqa_logits.py"),
    ("vllm/v1/attention/ops",),
    "0.24.0",
    "0.33.0",
    "attention",
)
"""Kernels of other models than MiniMax-M3; ops that they lack are missing, not the provider."""

SGLANG = Project(
    "sglang",
    ("sglang/kernels/ops/attention/minimax_sparse/", "sglang/srt/layers/attention/minimax_sparse_ops/"),
    ("sglang/kernels/ops/attention/minimax_sparse", "sglang/srt/layers/attention/minimax_sparse_ops"),
    "0.5.14",
    "0.5.23",
)
