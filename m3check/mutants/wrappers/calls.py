"""What is kept from one call to the next, and lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from m3check.mutants.wrappers import Function, Keywords, given

if TYPE_CHECKING:
    from torch import Tensor


def first_lengths() -> Callable[[Function, Keywords], Any]:
    """The lengths of a batch of this shape are those of the first call, as if captured."""
    kept: dict[Any, Tensor] = {}

    def change(keywords: Keywords) -> Tensor:
        shape = tuple((k, tuple(v.shape)) for k, v in keywords.items() if hasattr(v, "shape"))
        return kept.setdefault(shape, keywords["seq_lens"].clone())

    return given(seq_lens=change)


def weak_cache_key() -> Callable[[Function, Keywords], Any]:
    """What was compiled for these shapes is used again, with the forcing and the scale of then."""
    kept: dict[Any, Keywords] = {}

    def wrapper(function: Function, keywords: Keywords) -> Any:
        shape = tuple((k, tuple(v.shape)) for k, v in keywords.items() if k in ("idx_q", "q", "score"))
        baked: Keywords = {k: keywords[k] for k in ("init_blocks", "local_blocks", "sm_scale") if k in keywords}
        return function(**{**keywords, **kept.setdefault(shape, baked)})

    return wrapper


def without_prefix(keywords: Keywords) -> Tensor:
    """Verify rows (several queries of a request) see themselves alone."""
    lengths: Tensor = keywords["seq_lens"]
    query_len = keywords["decode_query_len"]
    return lengths if query_len == 1 else lengths.clamp(max=query_len)
