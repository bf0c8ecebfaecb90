"""Negative controls: kernels that differ from ours, or from anybody's, and are just as right. Each must stay green."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from m3check.mutants.catalogue import located
from m3check.mutants.mutant import Mutant, content_key
from m3check.mutants.rows import ATTENDING, SCORING, SELECTING
from m3check.mutants.sources import Sources
from m3check.mutants.wrappers import Function, Keywords, after, given
from m3check.types import BLOCK, Case, Profile

if TYPE_CHECKING:
    from torch import Tensor

POLYNOMIAL = '''

@triton.jit
def _power(x):
    """2 ** x by a polynomial of degree 7 on the fraction, within 2^-22."""
    whole = tl.floor(x)
    f = x - whole
    p = 1.5252733804059841e-05 * f + 0.00015403530393381608
    p = p * f + 0.0013333558146428443
    p = p * f + 0.009618129107628477
    p = p * f + 0.05550410866482158
    p = p * f + 0.2402265069591007
    p = p * f + 0.6931471805599453
    p = p * f + 1.0
    return tl.where(x < -140, 0.0, p * tl.exp2(tl.where(x < -140, 0.0, whole)))
'''

_EXP2 = {
    "attention.py": (("p = tl.exp2(logit - base[:, None])", "p = {}(logit - base[:, None])"),
                     ("decay = tl.exp2(top - base)", "decay = {}(top - base)")),
    "sparse_attn_decode.py": (("tl.exp2(top - base), tl.exp2(part_top - base)",
                               "{}(top - base), {}(part_top - base)"),),
}  # fmt: skip


def controls(origin: Sources) -> list[Mutant]:
    """The controls that suit a provider."""
    made = [
        _around("N1 tied blocks swapped", SELECTING, after(swapped_ties), origin, profile=_free_ties),
        _around("N2 another order of ids", ATTENDING, given(topk_idx=swapped_slots), origin, suits=_plain_lists),
        _around("N3 pages permuted", (*SCORING, *ATTENDING), other_pages, origin, suits=_plain_lists),
    ]
    if origin.name == "triton":
        made += [
            _tiles("N2 no splits", origin, (*SCORING, *ATTENDING), splits=lambda programs, most: 1),
            _tiles("N2 as many splits as can be", origin, (*SCORING, *ATTENDING), splits=lambda programs, most: most),
            _tiles("N2 64 keys a step of attention", origin, ATTENDING, attention_keys=lambda dtype: 64),
            _tiles("N2 256 keys a step of attention", origin, ATTENDING, attention_keys=lambda dtype: 256),
            _tiles("N2 16 rows and 32 keys a step of scoring", origin, SCORING, score_rows=lambda rows, dtype: 16,
                   score_keys=lambda dtype: 32),
            _tiles("N2 selection in parts of 16 blocks", origin, SELECTING, selection_width=lambda columns: 16,
                   selection_rows=lambda rows, width: 1),
            _polynomial(origin),
            _edited("N2 exp instead of exp2", origin, ATTENDING, *((file, before, _by_exp(before))
                    for file, pairs in _EXP2.items() for before, _ in pairs)),
            _edited("N2 blocks from the last to the first", origin, SCORING,
                    ("scoring.py", "for block in range(first_block.to(tl.int64), last_block.to(tl.int64)):",
                     "for back in range(first_block.to(tl.int64), last_block.to(tl.int64)):\n"
                     "            block = first_block.to(tl.int64) + last_block.to(tl.int64) - 1 - back")),
        ]  # fmt: skip
    return made


def _free_ties(profile: Profile) -> Profile:
    """What is left to promise when ties are exchanged on the host, which a graph cannot hold."""
    return replace(profile, tie_rule="any", bitwise=profile.bitwise - {"graph"})


def _plain_lists(case: Case) -> bool:
    return case.ids in ("full", "short")


def _around(
    name: str,
    ops: tuple[str, ...],
    wrapper: Callable[..., Any],
    origin: Sources,
    suits: Callable[[Case], bool] | None = None,
    profile: Callable[[Profile], Profile] | None = None,
) -> Mutant:
    key = content_key(origin.name, "control", name)
    text = f"around {', '.join(ops)}"
    return Mutant(
        origin.name, "control", name, text, key, wrapper=wrapper, ops=frozenset(ops), suits=suits, profile=profile
    )


def _tiles(name: str, origin: Sources, ops: tuple[str, ...], **figures: Callable[..., Any]) -> Mutant:
    def prepare() -> None:
        from m3check.kernels.triton import tiles

        vars(tiles).update(figures)

    return Mutant(origin.name, "control", name, f"tiles.{', '.join(figures)}", content_key(origin.name, "control", name),
                  prepare=prepare, ops=frozenset(ops))  # fmt: skip


def _edited(name: str, origin: Sources, ops: tuple[str, ...], *replacements: tuple[str, str, str]) -> Mutant:
    edits, _ = located(origin, replacements)
    return Mutant(origin.name, "control", name, f"{replacements[0][1]} → {replacements[0][2]}",
                  content_key(origin.name, "control", name), edits, ops=frozenset(ops), lines=(1, 1 << 30))  # fmt: skip


def _by_exp(text: str) -> str:
    """exp2(a - b) as exp((a - b) · ln 2)."""
    return text.replace("tl.exp2(", "tl.exp(0.6931471805599453 * (").replace(")", "))")


def _polynomial(origin: Sources) -> Mutant:
    replacements = []
    for file, pairs in _EXP2.items():
        replacements += [(file, before, after.replace("{}", "_power")) for before, after in pairs]
        head = {
            "attention.py": "\n\n@triton.jit\ndef attend(",
            "sparse_attn_decode.py": "\n\ndef sparse_attn_decode(",
        }[file]
        replacements.append((file, head, POLYNOMIAL + head))
    return _edited("N2 exp2 by a polynomial", origin, ATTENDING, *replacements)


# What they change.


def swapped_ties(result: Tensor, keywords: Keywords) -> None:
    """The last block taken is exchanged for one of equal score that was not."""
    score: Tensor | None = keywords.get("score", keywords.get("score_out"))
    starts, prefixes = keywords.get("cu_seqlens_q"), keywords.get("prefix_lens")
    if score is None:
        return
    for head in range(result.shape[0]):
        for row in range(score.shape[1]):
            ids = [i for i in result[head, row].tolist() if i >= 0]
            if starts is not None and prefixes is not None:
                request = int((starts[1:] <= row).sum())
                position = int(prefixes[request]) + row - int(starts[request])
            else:
                request, query = divmod(row, keywords["decode_query_len"])
                position = int(keywords["seq_lens"][request]) - keywords["decode_query_len"] + query
            seen = (position + BLOCK) // BLOCK
            forced = {*range(keywords["init_blocks"]), *range(seen - keywords["local_blocks"], seen)}
            free = [i for i in ids if i not in forced]
            if not free:
                continue
            last = free[-1]
            value = float(score[head, row, last])
            others = [b for b in range(seen) if b not in ids and b not in forced and float(score[head, row, b]) == value]
            if others:
                result[head, row, ids.index(last)] = others[-1]


def swapped_slots(keywords: Keywords) -> Tensor:
    """The first two ids of each list change places, without waiting for a device: another order of summation."""
    import torch

    ids: Tensor = keywords["topk_idx"]
    if ids.shape[2] < 2:
        return ids
    first, second, others = ids[..., :1], ids[..., 1:2], ids[..., 2:]
    both = (first >= 0) & (second >= 0)
    return torch.cat([torch.where(both, second, first), torch.where(both, first, second), others], dim=2)


def other_pages(function: Function, keywords: Keywords) -> Any:
    """The same cache with its pages in another order."""
    import torch

    name = "kv_cache" if "kv_cache" in keywords else "index_kv_cache"
    cache: Tensor = keywords[name]
    pages = cache.shape[0]
    place = torch.arange(pages - 1, -1, -1, device=cache.device)  # page p moves to pages - 1 - p
    raw = cache.view(torch.uint8) if cache.element_size() == 1 else cache
    changed: Keywords = {
        name: raw[place].view(cache.dtype),
        "block_table": place.to(torch.int32)[keywords["block_table"].long()],
    }
    for scale in ("k_scale", "v_scale"):
        value = keywords.get(scale)
        if value is not None and value.dim() == 2:
            changed[scale] = value.view(value.shape[0], pages, BLOCK)[:, place].reshape(value.shape)
    return function(**{**keywords, **changed})
