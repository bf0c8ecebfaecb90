"""Wrong tables of 16-token pages, and index keys that were inserted wrongly: the pieces of vLLM's path on AMD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from m3check.hypotheses import attention, geometry
from m3check.hypotheses.geometry import Change, positions
from m3check.hypotheses.hypothesis import Ground, Hypothesis
from m3check.types import BLOCK, Inputs, Outputs

if TYPE_CHECKING:
    from torch import Tensor

PAGES = BLOCK // 16
"""Pages of a block."""


def _own(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(position of each row [T], which rows list their own block [T])."""
    import torch

    assert inputs.topk_idx is not None
    position = torch.tensor(positions(inputs.case), device=inputs.topk_idx.device)
    return position, (inputs.topk_idx[0] == position[:, None].div(BLOCK, rounding_mode="floor")).any(-1) & (position >= 0)


def _whole(ground: Ground) -> Outputs:
    """The query's own block counts to its end."""
    context = ground.right["context"]
    return {"context": -(-context // BLOCK) * BLOCK}


def _tail(ground: Ground) -> Outputs:
    """A row that does not list its own block counts its tokens all the same."""
    position, listed = _own(ground.inputs)
    return {"context": ground.right["context"] + (position % BLOCK + 1) * (~listed & (position >= 0))}


def _padded(ground: Ground) -> Outputs:
    return {"context": ground.right["context"].clamp(min=1)}


def _in_order(ground: Ground) -> Outputs | None:
    """Blocks in the order of the list, the query's own among them."""
    import torch

    assert ground.inputs.topk_idx is not None
    pages, position = ground.right["pages"].clone(), positions(ground.inputs.case)
    for row, ids in enumerate(ground.inputs.topk_idx[0].tolist()):
        walked = [b for b in ids if 0 <= b <= position[row] // BLOCK and position[row] >= 0]
        cells = torch.tensor([PAGES * b + j for b in walked for j in range(PAGES)], dtype=pages.dtype)
        pages[row, : len(cells)] = cells.to(pages.device)
    return {"pages": pages}


def _first_page_lost(ground: Ground) -> Outputs | None:
    """The context is right, and the pages are those without the first visible block."""
    changed = attention.first_block_lost(ground.inputs)
    return None if changed is None else {"pages": ground.answer(changed)["pages"]}


def _foreign(ground: Ground) -> Outputs:
    """No cell names a page of the row's own request: FOREIGN of checks/pages.py."""
    pages = ground.right["pages"]
    return {"pages": pages.where(pages < 0, -2)}


def _unfiltered(ground: Ground) -> Outputs | None:
    """Listed blocks that a row does not see count in its context."""
    ids = ground.inputs.topk_idx
    assert ids is not None
    position, _ = _own(ground.inputs)
    unseen = (ids[0] * BLOCK > position[:, None]).sum(-1)
    return {"context": ground.right["context"] + BLOCK * unseen} if bool(unseen.any()) else None


# Index keys ----------------------------------------------------------------------------------------------------------


def _token_beside(by: int) -> Change:
    """The key of a neighbouring token."""

    def change(inputs: Inputs) -> Inputs | None:
        keys = inputs.more["index_k"]
        return replace(inputs, more={**inputs.more, "index_k": keys.roll(by, 0)}) if len(keys) > 1 else None

    return change


def _first_token(inputs: Inputs) -> Inputs | None:
    keys = inputs.more["index_k"]
    if len(keys) < 2:
        return None
    return replace(inputs, more={**inputs.more, "index_k": keys[:1].expand(keys.shape).contiguous()})


def _unwritten(ground: Ground) -> Outputs:
    """What poisoned memory holds, in slots of tokens that have one."""
    from m3check.types import skipped

    keys = ground.right["index_keys"].clone()
    keys[[not skipped(t) for t in range(len(keys))]] = float("nan")
    return {"index_keys": keys}


def _cut(ground: Ground) -> Outputs:
    """Keys whose last bits are cut off, where they should be rounded to the nearest code."""
    right = ground.right["index_keys"]
    keys, dtype = ground.inputs.more["index_k"].double(), ground.inputs.more["cached"].dtype
    from m3check.checks.bounds import half_ulp

    step = 2 * half_ulp(keys, dtype)
    return {"index_keys": ((keys / step).trunc() * step).where(right != 0, right)}


def _table(name: str, words: str, change: Change, gross: bool = False) -> Hypothesis:
    return Hypothesis(f"table_{name}", "table", words, change, gross)


def _formula(name: str, words: str, result: Callable[[Ground], Outputs | None]) -> Hypothesis:
    return Hypothesis(f"table_{name}", "table", words, result=result)


def _keys(name: str, words: str, change: Change, gross: bool = False) -> Hypothesis:
    return Hypothesis(f"keys_{name}", "keys", words, change, gross)


HYPOTHESES: tuple[Hypothesis, ...] = (
    _table("first_lost", "every row loses the first visible block of its list", attention.first_block_lost, gross=True),
    _table("last_lost", "every row loses the last visible block of its list", attention.last_block_lost),
    _table("own_lost", "every row loses its own block", attention.own_block_lost),
    _table("replaced", "a block not listed in place of a listed one", attention.block_replaced),
    _table("clamped", "-1 read as block 0, a block out of sight as the own one", attention.ids_clamped),
    _table("earlier", "rows stand one token earlier", geometry.EARLIER),
    _table("later", "rows stand one token later", geometry.LATER),
    _table("request_end", "every row stands at the end of its request", geometry.UNMASKED),
    _table("drafts_lost", "lengths without the draft tokens", geometry.DRAFTS_LOST),
    _formula("pages_lost", "the pages of the first visible block are lost, its tokens count", _first_page_lost),
    _formula("own_whole", "the query's own block counts to its end", _whole),
    _formula("own_unlisted", "the query's own block counts where it is not listed", _tail),
    _formula("order", "the query's own block is not the last one", _in_order),
    _formula("foreign", "no page is one of the row's own request", _foreign),
    _formula("dead_one", "rows that see nothing have a context of one token", _padded),
    _formula("unfiltered", "blocks out of sight count in the context", _unfiltered),
    _keys("token_before", "every slot holds the key of the token before", _token_beside(1), gross=True),
    _keys("token_after", "every slot holds the key of the token after", _token_beside(-1)),
    _keys("token_first", "every slot holds the key of the first token", _first_token),
    Hypothesis("keys_unwritten", "keys", "nothing is written", result=_unwritten),
    Hypothesis("keys_cut", "keys", "codes are cut off instead of rounded", result=_cut),
)
