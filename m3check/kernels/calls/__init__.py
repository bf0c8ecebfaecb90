"""How kernels are called, a file a family of ops; `contract` does what is the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping

from m3check.kernels.calls import amd, insert, latent, logits, sparse
from m3check.kernels.calls.family import BrokenContract, Calls
from m3check.types import OPS

__all__ = ["FAMILIES", "BrokenContract", "Calls", "of"]

FAMILIES: Mapping[str, Calls] = {
    "sparse": sparse.CALLS,
    "latent": latent.CALLS,
    "logits": logits.CALLS,
    "amd": amd.CALLS,
    "insert": insert.CALLS,
}


def of(op: str) -> Calls:
    """How the kernels of an op are called."""
    return FAMILIES[OPS[op].family]
