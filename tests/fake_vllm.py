"""A small vLLM in plain torch, as a source tree and as a wheel: what the providers' tests load instead of the real one."""

from __future__ import annotations

import base64
import hashlib
import textwrap
import zipfile
from collections.abc import Mapping
from pathlib import Path

OPS = "vllm/models/minimax_m3/common/ops"

INDEX = """
    import torch
    from vllm.platforms import current_platform
    from vllm.triton_utils import tl, triton
    from vllm.utils.math_utils import round_up

    VERSION_MARK = {mark!r}

    def minimax_m3_index_score(idx_q, index_kv_cache, block_table, cu_seqlens_q, seq_lens, prefix_lens, max_query_len,
                               max_seq_len, num_kv_heads):
        columns = round_up(triton.cdiv(max_seq_len, 128), 16)
        score = torch.full((num_kv_heads, idx_q.shape[0], columns), float("-inf"))
        score[..., 0] = VERSION_MARK
        score[..., 1] = float(current_platform.is_device_capability((12, 0)))
        score[..., 2] = float(current_platform.is_arch_support_pdl())
        return score

    def minimax_m3_index_topk(score, cu_seqlens_q, prefix_lens, max_query_len, topk, init_blocks, local_blocks, out=None):
        from vllm.platforms.rocm import on_gfx942
        return out.fill_(int(on_gfx942()))

    def minimax_m3_index_decode(idx_q, index_kv_cache, block_table, seq_lens, max_seq_len, topk, init_blocks, local_blocks,
                                num_kv_heads, decode_query_len, max_decode_query_len, out=None):
        return out.fill_(-1)
"""

SPARSE = """
    import torch
    from vllm.platforms import current_platform
    from vllm.triton_utils import tl, triton

    def _kernel(t_ptr, num_blocks):
        for slot in range(4):
            blk = tl.load(t_ptr + slot).to(tl.int32)
            {rule}

    def minimax_m3_sparse_attn(q, kv_cache, topk_idx, block_table, cu_seqlens_q, seq_lens, prefix_lens, max_query_len,
                               num_kv_heads, sm_scale, output{scales}):
        strides = [{strides}]
        output.zero_()

    def minimax_m3_sparse_attn_decode(q, kv_cache, topk_idx, block_table, seq_lens, num_kv_heads, sm_scale, output,
                                      decode_query_len{scales}):
        strides = [{strides}]
        _kernel[(1,)](topk_idx)
        output.zero_()
"""

BOUNDED = "valid = (blk >= 0) & (blk < num_blocks)"
COUNTED = "count = tl.sum((blk >= 0).to(tl.int32), axis=0)"
UNSEEN = "pass"


def files(mark: float = 1.0, rule: str = BOUNDED, packed: bool = True) -> dict[str, str]:
    """The kernel files by their path in a wheel; `mark` is what index_score answers."""
    strides = ", ".join(f"kv_cache.stride({i})" for i in range(4 if packed else 5))
    scales = ", k_scale=None, v_scale=None" if packed else ""
    return {
        "vllm/__init__.py": "raise RuntimeError('vllm itself was executed')\n",
        "vllm/models/minimax_m3/__init__.py": "raise RuntimeError('a package of vllm was executed')\n",
        f"{OPS}/index_topk.py": textwrap.dedent(INDEX.format(mark=mark)),
        f"{OPS}/sparse_attn.py": textwrap.dedent(SPARSE.format(strides=strides, scales=scales, rule=rule)),
    }


def tree(folder: Path, contents: Mapping[str, str]) -> Path:
    """Write files below a folder, which is returned."""
    for path, text in contents.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return folder


def wheel(
    folder: Path,
    version: str,
    contents: Mapping[str, str],
    *,
    recorded: Mapping[str, str] | None = None,
    record: bool = True,
    project: str = "vllm",
) -> Path:
    """A wheel of those files; RECORD is made from `recorded`, where that differs from what is inside."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / wheel_name(version, project)
    info = f"{project}-{version}.dist-info"
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp38-abi3-manylinux_2_31_x86_64\n",
    }
    rows = [
        f"{name},sha256={_digest(text)},{len(text)}" for name, text in {**contents, **(recorded or {}), **metadata}.items()
    ]
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**contents, **metadata}.items():
            archive.writestr(name, text)
        if record:
            archive.writestr(f"{info}/RECORD", "\n".join([*rows, f"{info}/RECORD,,"]) + "\n")
    return path


def wheel_name(version: str, project: str = "vllm") -> str:
    """A wheel's file name, tagged as the published ones are."""
    return f"{project}-{version}-cp38-abi3-manylinux_2_31_x86_64.whl"


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
