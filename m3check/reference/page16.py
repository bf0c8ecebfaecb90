"""Where tokens go in a cache whose blocks hold keys and values side by side, numbered by pages of 16 tokens.

    index_keys[t] = the index key of token t, rounded to the cache's dtype, whose largest number stands for what is larger;
        a token of negative slot is written nowhere
    slots[t] = the token that the renumbered slot of token t stands for, or its own negative slot
    blocks[r, b] = b: the block that the renumbered page id stands for; -1 past a request's last block

Which tokens have no slot is a rule of the cases alone: `skipped`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m3check.types import Request, blocks, skipped


def index_insert(index_k: Tensor, cached: Tensor) -> Tensor:
    """[T, D] fp64 from keys [T, D]; `cached` is an empty tensor of the cache's dtype. 0 in rows that are not written."""
    kept = [not skipped(t) for t in range(len(index_k))]
    largest = torch.finfo(cached.dtype).max
    rounded = index_k.float().clamp(-largest, largest).to(cached.dtype).double()
    return rounded * torch.tensor(kept, device=index_k.device)[:, None]


def page16_rebase(requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
    """(slots [T] int64, blocks [R, K] int64), on the CPU; T query tokens, R requests, K blocks of the longest."""
    tokens = [request.position(i) for request in requests for i in range(request.query_len)]
    columns = max(blocks(request.kv_len) for request in requests)
    table = [[b if b < blocks(request.kv_len) else -1 for b in range(columns)] for request in requests]
    return torch.tensor([-1 if skipped(t) else token for t, token in enumerate(tokens)]), torch.tensor(table)
