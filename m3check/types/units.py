"""Figures of the model, words of dtypes, and the one exception for what a user can mend."""

from __future__ import annotations

from collections.abc import Mapping

BLOCK = 128
"""Tokens in one sparse block, which is also one KV page."""

ROPE = 64
"""Channels of a latent key that carry its position, and are no part of its value."""

BEYOND = -2
"""In a list of tokens: a slot that names a row past the whole cache, which counts as unused; -1 is unused, too."""

INIT_SCORE = 1e30
"""What a forced init block's score cell holds in kernels that force inside the scores."""

LOCAL_SCORE = 1e29
"""Likewise for a forced local block; a block that is both holds this one."""

DTYPES: Mapping[str, str] = {  # the word in ids and reports: the attribute of torch
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp8_e4m3fn": "float8_e4m3fn",
    "fp8_e4m3fnuz": "float8_e4m3fnuz",
    "fp8_e5m2": "float8_e5m2",
    "fp8_e5m2fnuz": "float8_e5m2fnuz",
}


def blocks(tokens: int) -> int:
    """How many 128-token blocks hold `tokens` tokens (0 for none, or for a negative length)."""
    return max(0, -(-tokens // BLOCK))


def skipped(token: int) -> bool:
    """Whether a query token of an insertion into a cache has no slot there, as padded tokens have none: every fifth."""
    return token % 5 == 3


class M3CheckError(Exception):
    """A mistake that the user can mend; its text says what, got, wanted and how. Exit code 4."""
