"""The op `indexer` around right torch kernels: cases, host code to make wrong, and what the checks say of it."""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch_kernels

from m3check import cases, runner
from m3check.arch import ARCHS
from m3check.kernels.composed import Composed, ComposedMaker
from m3check.kernels.provider import Loaded, with_chains
from m3check.types import Kernel, PlanLine, Profile, Status

MIXED = "indexer/q=1x3+3+2,kv=300+130+520+400+258,h=2,g=2,d=16,topk=2,init=1"
DRAFTS = "indexer/q=2x2+1+4,kv=300+0+140+390,h=2,g=1,d=16,topk=2,mq=4"
DECODES = "indexer/q=1x3,kv=300+0+520,h=2,g=2,d=16,topk=2"
PREFILLS = "indexer/q=3+2,kv=400+258,h=2,g=1,d=16,topk=2"
ALL = (MIXED, DRAFTS, DECODES, PREFILLS)


def launched(function):
    """The function as a launch: what it does inside is no host code of its caller's."""

    @functools.wraps(function)
    def call(*args, **keywords):
        with torch._C.DisableTorchFunction():
            return function(*args, **keywords)

    return call


def parts() -> dict[str, Kernel]:
    """Right kernels, by op."""
    names = ("index_score", "index_topk", "index_decode", "sparse_attn", "sparse_attn_decode")
    return {op: Kernel("torch", op, op, Profile(), launched(getattr(torch_kernels, op))) for op in names}


def layer(kind: type[Composed] = Composed, layout: str = "head", made: dict[str, Kernel] | None = None) -> Kernel:
    """An implementation of the op around torch kernels."""
    made = made or parts()

    class Maker(ComposedMaker):
        def __call__(self, figures, buffers):
            return kind(self.parts, figures, buffers)

    return dataclasses.replace(with_chains(made, {})[0]["indexer"], function=Maker(made, layout))


def result(text: str, kind: type[Composed] = Composed, layout: str = "head", invariants: tuple[str, ...] = (), made=None):
    """What the checks say of one implementation on one case."""
    session = runner.Session(ARCHS["sm90"], "interpreted", "cpu", Loaded.of({"indexer": layer(kind, layout, made)}))
    return runner.run_one(
        cases.parse_id(text), session, PlanLine(text, "indexer", "torch", "interpreted", None, invariants), ""
    )


def red(told) -> dict[str, str]:
    """Where and how each check failed."""
    return {f.check: f"{f.where}: {f.hint}" for f in told.findings if f.status is Status.FAILED}


class Shifted(Composed):
    """Hands over another part of the batch's rows: changed metadata of the indexer, of attention or of both."""

    change: tuple[str, ...] = ("index",)

    def build(self, batch):
        index, main = super().build(batch)
        return self.changed(index, batch) if "index" in self.change else index, (
            self.changed(main, batch) if "main" in self.change else main
        )

    def changed(self, metadata, batch):
        raise NotImplementedError


class HostLengths(Composed):
    """Hands kernels the lengths that the host knew when the metadata were built."""

    def build(self, batch):
        index, main = super().build(batch)
        self._lengths = {**getattr(self, "_lengths", {}), id(index): batch.seq_lens_host.clone()}
        return index, main

    def forward(self, metadata, tensors):
        def known(held):
            lengths = self._lengths[id(metadata[0])][: held.num_decodes]
            return dataclasses.replace(held, decode=dataclasses.replace(held.decode, seq_lens=lengths))

        return super().forward((known(metadata[0]), known(metadata[1])), tensors)


class CopiedLate(Composed):
    """Copies lengths at the first launch with some metadata, so that only a launch before the refill shows it."""

    def forward(self, metadata, tensors):
        kept = self.__dict__.setdefault("kept", {})

        def copied(held):
            lengths = kept.setdefault(id(metadata[0]), held.decode.seq_lens.clone())
            return dataclasses.replace(held, decode=dataclasses.replace(held.decode, seq_lens=lengths))

        return super().forward((copied(metadata[0]), copied(metadata[1])), tensors)
