"""What a pair of metadata objects holds, whatever classes they are of: tensors by name, figures, what moved between two."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

VIEWS = (".seq_lens", ".block_table", ".slot_mapping", ".prefix_lens", ".context_lens", ".unified_scores",
         ".topk_num_valid_pages", ".topk_prefix_lens", ".topk_cu_seqlens_q", ".page16_slot_mapping")  # fmt: skip
"""Tensors of metadata that are views of persistent memory in both parts, beside all of the decoded part."""


def tensors(metadata: tuple[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a pair of metadata objects, by the path of attributes that leads to it."""
    import torch

    def walk(name: str, held: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
        if isinstance(held, torch.Tensor):
            yield name, held
        elif depth and held is not None and not isinstance(held, int | float | str | bool):
            for key, value in _attributes(held).items():
                yield from walk(f"{name}.{key}", value, depth - 1)

    for name, held in zip(("index", "main"), metadata, strict=True):
        yield from walk(name, held, 3)


def _attributes(held: Any) -> dict[str, Any]:
    if isinstance(held, dict):
        return held
    if dataclasses.is_dataclass(held):
        return {field.name: getattr(held, field.name) for field in dataclasses.fields(held)}
    return {name: value for name, value in getattr(held, "__dict__", {}).items() if not name.startswith("_")}


def plain(held: Any) -> Any:
    """A metadata object as nested dicts of figures and (dtype, values); what is neither is left out."""
    import torch

    if isinstance(held, torch.Tensor):  # of scores the step's own outputs tell
        return None if held.is_floating_point() else (str(held.dtype).removeprefix("torch."), held.tolist())
    if isinstance(held, int | float | bool) or held is None:
        return held
    return {name: kept for name, value in _attributes(held).items() if (kept := plain(value)) is not None}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Views of persistent memory that do not lie where those of the batch before lay.

    A view of another shape may begin elsewhere, behind another number of decoded requests, but in the same memory.
    """
    found = []
    for name, tensor in after.items():
        old = before.get(name)
        if old is None or not tensor.numel() or not old.numel() or not (".decode." in name or name.endswith(VIEWS)):
            continue
        elsewhere = old.shape == tensor.shape and old.data_ptr() != tensor.data_ptr()
        if elsewhere or old.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            found.append(name)
    return found


def unset(tensor: Tensor) -> bool:
    """Whether a score buffer that metadata hold was not filled with -inf, so that a block of nobody could be chosen."""
    return tensor.is_floating_point() and bool((tensor != float("-inf")).any())
