"""Memory so large that offsets into it pass 2^31 elements, of which only the touched pages cost anything."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from m3check.types import M3CheckError

REACH = 2**31
"""Elements that a signed 32-bit offset cannot count."""

NO_RESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Linux's flag, which Python names from 3.13 on: the kernel sets no memory aside."""

SHARE = 4
"""How many times over a GPU must have the memory free, which other workers may be about to take."""


def allocate(elements: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """`elements` zeros, and REACH more before them: there an offset that wrapped around lands, instead of in a fault.

    On a CPU the memory is mapped and not committed. Raises M3CheckError where there is not that much.
    """
    size = (elements + REACH) * dtype.itemsize
    if torch.device(device).type == "cpu":
        try:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
            raw = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.uint8)
        except (OSError, ValueError) as error:
            raise M3CheckError(f"{size >> 30} GB of address space cannot be mapped: {error}") from error
    else:
        free, _ = torch.cuda.mem_get_info(device)
        if free < SHARE * size:
            raise M3CheckError(f"{SHARE * size >> 30} GB should be free on {device}, and {free >> 30} GB are")
        raw = torch.zeros(size, dtype=torch.uint8, device=device)
    return raw.view(dtype)[REACH:]


def first_page(page_elements: int) -> int:
    """The lowest page id whose page of `page_elements` begins past REACH elements."""
    return REACH // page_elements + 1


def spread(tensor: Tensor, dim: int) -> Tensor:
    """A copy of a tensor whose entries along `dim` are so far apart that the last one begins past REACH elements.

    The other dimensions lie dense inside an entry, in their order; a single entry stays where it is.
    """
    inner = [n for i, n in enumerate(tensor.shape) if i != dim]
    size = math.prod(inner)
    gap = -(-max(size, REACH // max(tensor.shape[dim] - 1, 1) + 1) // 64) * 64
    strides = [math.prod(inner[i + 1 :]) for i in range(len(inner))]
    strides.insert(dim, gap)
    far = allocate((tensor.shape[dim] - 1) * gap + size, tensor.dtype, tensor.device)
    view = far.as_strided(tensor.shape, strides, far.storage_offset())
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    view.view(words).copy_(tensor.view(words))
    return view
