"""Random bits that every machine agrees on: raw Philox words, mapped to values by table look-up only.

No floating-point arithmetic happens per value, so that a CPU and any GPU, today and under another numpy, hold the same
bits: a table of 65,536 entries is converted to the target dtype once, on the CPU, and then only copied from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    Words = npt.NDArray[np.uint16]
    Table = npt.NDArray[np.float64]

ENTRIES = 1 << 16
CHUNK = 1 << 24
"""Words mapped at a time: bounds the memory for indices on a device."""


def key(text: str) -> int:
    """A 128-bit Philox key from any text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


class Stream:
    """The random words of one tensor of one case: independent of how many other tensors the case has."""

    def __init__(self, name: str) -> None:
        import numpy as np

        self._philox = np.random.Philox(key=key(name))

    def words(self, count: int) -> Words:
        """The next `count` 16-bit words."""
        import numpy as np

        raw: npt.NDArray[np.uint64] = np.asarray(self._philox.random_raw(-(-count // 4)), dtype="<u8")
        return raw.view("<u2")[:count]

    def below(self, bound: npt.NDArray[np.int64] | int, shape: Sequence[int]) -> npt.NDArray[np.int64]:
        """Whole numbers in [0, bound), elementwise; bounds reach to 2^31, the bias is below bound / 2^32."""
        import numpy as np

        count = int(np.prod(shape, dtype=np.int64))
        words = self.words(2 * count).astype(np.int64).reshape(-1, 2)
        wide = (words[:, 0] << 16 | words[:, 1]).reshape(tuple(shape))
        drawn: npt.NDArray[np.int64] = wide * np.asarray(bound, dtype=np.int64) >> 32
        return drawn


def look_up(table: Table, words: Words, shape: Sequence[int], dtype: str, device: torch.device | str) -> torch.Tensor:
    """`table[words]` as a tensor of a dtype word; values were rounded to that dtype (to nearest even) in the table."""
    import numpy as np
    import torch

    from m3check.paging import torch_dtype

    wanted = torch_dtype(dtype)
    converted = torch.from_numpy(table).float().to(wanted)
    bits_dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[wanted.itemsize]
    bits = converted.view(bits_dtype)
    if torch.device(device).type == "cpu":
        # mode="clip" keeps numpy from copying the index array to look for negative ones
        values = torch.from_numpy(np.take(bits.numpy(), words, mode="clip"))
        return values.view(wanted).reshape(tuple(shape))
    return gathered(bits.to(device), words, torch.device(device)).view(wanted).reshape(tuple(shape))


def gathered(bits: torch.Tensor, words: Words, device: torch.device) -> torch.Tensor:
    """`bits[words]` on a device, some words at a time."""
    import numpy as np
    import torch

    out = torch.empty(len(words), dtype=bits.dtype, device=device)
    for start in range(0, len(words), CHUNK):
        piece = torch.from_numpy(words[start : start + CHUNK].view(np.int16)).to(device)
        out[start : start + CHUNK] = bits[piece.int() & 0xFFFF]
    return out


@lru_cache(maxsize=1)
def normal_quantiles() -> Table:
    """The 65,536 midpoint quantiles of N(0, 1) on a grid of 2^-12, within ±4.33.

    The grid is far coarser than what libraries disagree about in the last bit of a logarithm.
    """
    from statistics import NormalDist

    import numpy as np

    half = ENTRIES // 2
    upper = [round(NormalDist().inv_cdf(0.5 + (i + 0.5) / ENTRIES) * 4096) / 4096 for i in range(half)]
    return np.array([-x for x in reversed(upper)] + upper)
