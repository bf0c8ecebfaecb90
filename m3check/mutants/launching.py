"""Catalogue rows in the form that they take where launches are real: replayed, in flight together, dependent, racing.

What the catalogue holds beside them shows without a GPU too; these need one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from m3check.mutants.mutant import Edit, Mutant, Wrapper, content_key
from m3check.mutants.sources import Sources
from m3check.types import Case

if TYPE_CHECKING:
    from torch import Tensor

Keywords = dict[str, Any]
Function = Callable[..., Any]

DECODING = ("index_decode_score", "index_decode", "sparse_attn_decode")
EVERY = ("index_score", "index_topk", *DECODING, "sparse_attn")
LENGTHS = ("seq_lens", "prefix_lens", "cu_seqlens_q")
METADATA = (*LENGTHS, "block_table")


@dataclass(frozen=True)
class Form:
    """One row of the catalogue on some ops; `make` gives a wrapper with a memory of its own, `prepare` changes Triton."""

    row: str
    what: str
    ops: tuple[str, ...]
    shown_by: str
    make: Callable[[], Wrapper] | None = None
    prepare: Callable[[], None] | None = None
    provider: str = ""
    """Whose kernels; empty for anybody's."""
    edits: tuple[tuple[str, str, str], ...] = ()
    """(file, before, after) of the provider's sources, each replacing the one place that reads `before`."""
    suits: Callable[[Case], bool] | None = None
    """Cases on which it can show; None: all."""


def _empty_parts(case: Case) -> bool:
    """Whether some part of a row's list, split for decode, names no block that the row sees."""
    return case.topk > 1 and (case.ids in ("short", "holes") or case.block_columns < case.topk)


# Wrappers.


def frozen_at_capture() -> Wrapper:
    """A graph replays with the lengths of its capture: they were read on the host, or copied before."""
    kept: dict[Any, Tensor] = {}

    def wrapper(function: Function, keywords: Keywords) -> Any:
        import torch

        changed: Keywords = {}
        for name in LENGTHS:
            if keywords.get(name) is None:
                continue
            key = name, tuple(keywords[name].shape)
            if torch.cuda.is_current_stream_capturing():
                changed[name] = kept[key]
            else:
                kept[key] = keywords[name].clone()
        return function(**{**keywords, **changed})

    return wrapper


def shared_metadata() -> Wrapper:
    """Lengths and tables of every launch go through the same buffers, which the next launch overwrites."""
    staging: dict[Any, Tensor] = {}

    def wrapper(function: Function, keywords: Keywords) -> Any:
        changed: Keywords = {}
        for name in METADATA:
            tensor = keywords.get(name)
            if tensor is not None:
                buffer = staging.setdefault((name, tuple(tensor.shape)), tensor.clone())
                buffer.copy_(tensor)
                changed[name] = buffer
        return function(**{**keywords, **changed})

    return wrapper


# Triton.


def topk_of_the_first_compilation() -> None:
    """What was compiled for one topk is launched for another: the key of compiled kernels lacks that constant."""
    from triton.runtime.jit import JITFunction

    original = JITFunction.run
    first: dict[Any, Any] = {}

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = [parameter.name for parameter in self.params]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for index, name in enumerate(names):
            if name.lower() != "topk" or name not in given or not self.params[index].is_constexpr:
                continue
            rest = [p.name for p in self.params if p.is_constexpr and p.name != name]
            key = (id(self), *(str(given.get(other)) for other in rest))
            compiled = first.setdefault(key, given[name])
            if name in kwargs:
                kwargs[name] = compiled
            else:
                args = (*args[:index], compiled, *args[index + 1 :])
        return original(self, *args, **kwargs)

    JITFunction.run = run


# Sources.

_WAIT = "    if USE_PDL:\n        tl.extra.cuda.gdc_wait()\n"
_START = "        tl.extra.cuda.gdc_launch_dependents()\n"
_ATTEND, _INDEX = "common/ops/sparse_attn.py", "common/ops/index_topk.py"
_LENGTH = "    seq_len = tl.load(seq_lens + req_id)\n"
_ROW_LENGTH = "    seq_len = tl.load(seq_lens + pid_r)\n"
_DONE = "    if USE_PDL:\n" + _START + "\n    # E"

FORMS: tuple[Form, ...] = (
    Form("W1", "lengths of the capture", EVERY, "graph", frozen_at_capture),
    Form("W3", "one set of buffers for lengths and tables", EVERY, "load", shared_metadata),
    Form("W5", "topk of the first compilation", ("index_topk", "index_decode"), "other_topk",
         prepare=topk_of_the_first_compilation, provider="triton"),
    Form("W5", "topk of the first compilation", ("index_decode",), "other_topk",
         prepare=topk_of_the_first_compilation, provider="vllm"),
    Form("W7", "attention waits below its length", ("sparse_attn_decode",), "dependent_launch", provider="vllm", edits=(
        (_ATTEND, _WAIT + "\n" + _LENGTH, _LENGTH + _WAIT),
    )),
    Form("W7", "attention waits below its ids", ("sparse_attn_decode",), "dependent_launch", provider="vllm", edits=(
        (_ATTEND, _WAIT + "\n" + _LENGTH, _LENGTH),
        (_ATTEND, _DONE, _WAIT + _START + "\n    # E"),
    )),
    Form("W7", "scoring waits below its length", DECODING[:2], "dependent_launch", provider="vllm", edits=(
        (_INDEX, _WAIT + _START + "\n" + _ROW_LENGTH, _ROW_LENGTH + _WAIT + _START),
    )),
    Form("W7", "selection waits below the scores", ("index_decode",), "dependent_launch", provider="vllm", edits=(
        (_INDEX, _WAIT + "\n" + _LENGTH, _LENGTH),
        (_INDEX, _DONE, _WAIT + _START + "\n    # E"),
    )),
    Form("M5", "programs of empty parts write zeros where another merges", ("sparse_attn_decode",), "", provider="triton",
         suits=_empty_parts, edits=(
             ("sparse_attn_decode.py", "    for part in range(parts):\n        at = part * rows + row\n",
              "    own = tl.load(totals + tl.program_id(1) * rows + row, mask=live, other=1.0)\n"
              "    for part in range(parts):\n        at = part * rows + row\n"),
             ("sparse_attn_decode.py",
              "    tl.store(output + at, normalised(acc, total).to(output.dtype.element_ty), mask=live[:, None])",
              "    first = tl.program_id(1) == 0\n"
              "    result = tl.where(first, normalised(acc, total), 0.0)\n"
              "    live = live & (first | (own == 0))\n"
              "    tl.store(output + at, result.to(output.dtype.element_ty), mask=live[:, None])"),
             ("sparse_attn_decode.py", "merge_kernel[(triton.cdiv(rows, tile),)](",
              "merge_kernel[(triton.cdiv(rows, tile), parts)]("),
         )),
)  # fmt: skip


def mutants(origin: Sources) -> list[Mutant]:
    """The mutants of a provider: one for an edit, one for each op of another form; none where its text is not there."""
    made: list[Mutant] = []
    for form in FORMS:
        if form.provider in ("", origin.name):
            made += _of(origin, form)
    return made


def _of(origin: Sources, form: Form) -> list[Mutant]:
    name = f"{form.row} {form.what}"
    if form.edits:
        edits = tuple(edit for text in form.edits for edit in _edit(origin, *text))
        if len(edits) != len(form.edits):
            return []  # another version of these sources
        file, before, after = form.edits[0]
        text = f"{file}: {' '.join(before.split())} → {' '.join(after.split())}"
        key = content_key(origin.name, "catalogue", form.row, form.what)
        return [_mutant(origin, name, text, key, form, form.ops, edits=edits)]
    return [
        _mutant(
            origin,
            f"{name}: {op}",
            f"around {op}",
            content_key(origin.name, "catalogue", form.row, form.what, op),
            form,
            (op,),
            wrapper=form.make() if form.make else None,
        )
        for op in form.ops
    ]


def _mutant(origin: Sources, name: str, text: str, key: str, form: Form, ops: tuple[str, ...], **fields: Any) -> Mutant:
    return Mutant(
        origin.name,
        "catalogue",
        name,
        text,
        key,
        prepare=form.prepare,
        ops=frozenset(ops),
        where="device",
        shown_by=form.shown_by,
        suits=form.suits,
        **fields,
    )


def _edit(origin: Sources, file: str, before: str, after: str) -> list[Edit]:
    """The edit of the one place that reads `before`; none where there is no such place."""
    source = origin.read(file) if file in origin.files else b""
    if source.count(before.encode()) != 1:
        return []
    start = source.index(before.encode())
    return [Edit(file, start, start + len(before.encode()), after.encode())]
