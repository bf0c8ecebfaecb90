"""How a kernel is called: the keyword arguments of each op, built from logical inputs, and what must come back.

Providers that keep these names need no adapter code: a parameter that a function does not take is not passed, and one that
m3check does not know is an error that lists the known ones. `m3check kernels --signatures` prints SIGNATURES.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from m3check.types import OPS, Case, Inputs, Kernel, M3CheckError

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.paging import Guard, Observation, Pages, Run, Territory, World

PARAMETERS: Mapping[str, str] = {
    "idx_q": "[T, H, D] query dtype: index queries, one head for each KV head",
    "index_kv_cache": "[pages, 128, D] cache dtype: index keys, shared by all index heads",
    "block_table": "[R, columns] int32: page of each logical block; past the last one, pages not to be read",
    "cu_seqlens_q": "[R + 1] int32: first query row of each request, then T",
    "seq_lens": "[R] int32: visible tokens of each request, its queries included; 0 is a padded row (decode)",
    "prefix_lens": "[R] int32: tokens before the first query: seq_lens - query lengths",
    "max_query_len": "int: longest query length of the batch",
    "max_seq_len": "int: at least the longest visible length",
    "num_kv_heads": "int: KV heads, also the index heads",
    "topk": "int: ids of each row",
    "init_blocks": "int: the first blocks that are always taken",
    "local_blocks": "int: the last visible blocks that are always taken, the query's own included",
    "decode_query_len": "int: query tokens of every request of a decode batch",
    "max_decode_query_len": "int: at least decode_query_len; the graph was captured for it",
    "score": "[H, T, K] fp32, any strides: block scores; cells of invisible blocks are undefined",
    "q": "[T, Hq, D] query dtype, any strides: attention queries",
    "kv_cache": "[pages, Hkv, 128, 2D] cache dtype, any strides: keys in the first D channels, values in the others",
    "topk_idx": "[H, T, topk] int32, any strides: logical block ids, -1 for an unused slot",
    "sm_scale": "float: the logits are q·k times this",
    "k_scale": "None, [1] or [Hkv, pages * 128] fp32: what an fp8 key is multiplied by",
    "v_scale": "likewise for values",
    "out": "[H, >= T, topk] int32: where to write the ids (optional)",
    "score_out": "[H, T, >= K] fp32, any strides: where to write the scores (optional)",
    "output": "[T, Hq, D], any strides: where to write the attention output",
}

SIGNATURES: Mapping[str, tuple[tuple[str, ...], str]] = {  # op: (parameters, what comes back)
    "index_score": (
        ("idx_q", "index_kv_cache", "block_table", "cu_seqlens_q", "seq_lens", "prefix_lens", "max_query_len",
         "max_seq_len", "num_kv_heads"),
        "[H, T, >= K] fp32; cells of blocks that a query does not see are -inf or left alone",
    ),
    "index_topk": (
        ("score", "cu_seqlens_q", "prefix_lens", "max_query_len", "topk", "init_blocks", "local_blocks", "out"),
        "[H, T, topk] int32, -1 in unused slots",
    ),
    "index_decode_score": (
        ("idx_q", "index_kv_cache", "block_table", "seq_lens", "max_seq_len", "init_blocks", "local_blocks", "num_kv_heads",
         "decode_query_len", "max_decode_query_len", "score_out"),
        "[H, T, >= K] fp32; forced cells hold 1e30 (init) or 1e29 (local)",
    ),
    "index_decode": (
        ("idx_q", "index_kv_cache", "block_table", "seq_lens", "max_seq_len", "topk", "init_blocks", "local_blocks",
         "num_kv_heads", "decode_query_len", "max_decode_query_len", "out", "score_out"),
        "[H, T, topk] int32, -1 in unused slots",
    ),
    "sparse_attn": (
        ("q", "kv_cache", "topk_idx", "block_table", "cu_seqlens_q", "seq_lens", "prefix_lens", "max_query_len",
         "num_kv_heads", "sm_scale", "output", "k_scale", "v_scale"),
        "None, or [T, Hq, D]",
    ),
    "sparse_attn_decode": (
        ("q", "kv_cache", "topk_idx", "block_table", "seq_lens", "num_kv_heads", "sm_scale", "output", "decode_query_len",
         "k_scale", "v_scale"),
        "None, or [T, Hq, D]",
    ),
}  # fmt: skip

OPTIONAL = frozenset(
    {"out", "score_out", "output", "k_scale", "v_scale", "num_kv_heads", "seq_lens", "max_query_len", "max_seq_len",
     "max_decode_query_len"}
)  # fmt: skip
"""Parameters that a kernel may do without: buffers, where it returns its result, and what follows from the others."""


RESULT_IN: Mapping[str, str] = {"score": "score_out", "ids": "out", "out": "output"}
"""The buffer that a caller reads an output from, where it gave one."""

CHANNELLED = frozenset({"idx_q", "index_kv_cache", "q", "kv_cache", "topk_idx", "score", *RESULT_IN.values()})
"""Tensors whose last dimension may be strided, for kernels that promise to bear it."""

TOKEN_DIMENSION: Mapping[str, int] = {
    "idx_q": 0, "q": 0, "output": 0, "topk_idx": 1, "score": 1, "out": 1, "score_out": 1,
}  # fmt: skip
"""Which dimension of a tensor counts the query tokens."""

FRESH = frozenset({"idx_q", "score", "topk_idx"})
"""What the kernel launched before an op's own writes, in the model: index queries, block scores, selected ids."""


class BrokenContract(M3CheckError):
    """A kernel that cannot be called, or whose result has the wrong shape or dtype."""


def check_signature(op: str, function: Callable[..., Any], name: str) -> frozenset[str]:
    """The keywords to pass; raises BrokenContract for a parameter that the op's contract does not have."""
    known = SIGNATURES[op][0]
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return frozenset(known)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):  # nobody promised to write into a buffer unnamed
        return frozenset(p for p in known if p in parameters or p not in ("out", "score_out"))
    for parameter in parameters.values():
        if parameter.name not in known and parameter.default is parameter.empty:
            raise BrokenContract(
                f"{name} has a parameter {parameter.name!r} that {op} does not provide; it may take: {', '.join(known)} "
                "(see m3check kernels --signatures)"
            )
    missing = [p for p in known if p not in parameters and p not in OPTIONAL]
    if missing:
        lacks = f"{name} lacks the parameter(s) {', '.join(missing)} of {op}"
        raise BrokenContract(f"{lacks} (see m3check kernels --signatures)")
    return frozenset(p for p in known if p in parameters)


Observe: TypeAlias = "Callable[[Sequence[Territory]], AbstractContextManager[Observation]]"
"""Watches memory while a kernel runs that may use these tensors only; all is told when the block is left."""


def call(kernel: Kernel, inputs: Inputs, world: World | None = None, observe: Observe | None = None) -> Run:
    """Run one kernel (or, for a chain, its parts in order) on physical tensors made from `inputs`."""
    from m3check.paging import World

    world = world or World()
    if OPS[kernel.op].chain:
        return _call_chain(kernel, inputs, world, observe)
    return _call_one(kernel, inputs, world, {}, observe)


def _call_chain(kernel: Kernel, inputs: Inputs, world: World, observe: Observe | None) -> Run:
    from m3check.paging import Run

    total = Run({})
    upstream: dict[str, Tensor] = {}
    for op in OPS[kernel.op].chain:
        run = _call_one(kernel.parts[op], inputs, world, upstream, observe)
        if run.accesses is not None:
            total.accesses = (total.accesses or []) + run.accesses
        total.outputs |= run.outputs
        total.guards += run.guards
        total.frozen += run.frozen
        total.beyond |= run.beyond
        total.given |= run.given
    return total


@dataclass
class Prepared:
    """A call of one kernel (never a chain) whose physical tensors stand ready; `launch` may be repeated."""

    kernel: Kernel
    inputs: Inputs
    arguments: dict[str, Any]
    buffers: dict[str, Guard]  # what the kernel writes into, the one that holds its result first
    run: Run
    territories: tuple[Territory, ...] = ()
    """What the kernel may do with each tensor."""

    def launch(self) -> Any:
        """Call the kernel; returns its result, in physical form."""
        returned = self.kernel.function(**self.arguments)
        buffer = next(iter(self.buffers.values()), None)
        if returned is None and buffer is None:
            wanted = SIGNATURES[self.kernel.op][1]
            raise BrokenContract(f"{self.kernel.name} returned None and takes no buffer; {self.kernel.op} returns {wanted}")
        return returned if returned is not None else buffer.view  # type: ignore[union-attr]

    def take(self, result: Any) -> Run:
        """The run with a copy of `result` in logical form, and of the scores that a selection was given a buffer for."""
        run, output = self.run, OPS[self.kernel.op].outputs[0]
        run.outputs[output], beyond = _logical(self.kernel, output, result, self.inputs)
        if beyond is not None:
            run.beyond[output] = beyond
        buffer = self.buffers.get(RESULT_IN[output])
        if buffer is not None and result.untyped_storage().data_ptr() != buffer.view.untyped_storage().data_ptr():
            run.given[output], _ = _logical(self.kernel, output, buffer.view, self.inputs)
        if output == "ids" and "score_out" in self.buffers:
            run.outputs["score"], _ = _logical(self.kernel, "score", self.buffers["score_out"].view, self.inputs)
        return run


def _call_one(kernel: Kernel, inputs: Inputs, world: World, upstream: dict[str, Tensor], observe: Observe | None) -> Run:
    prepared = prepare(kernel, inputs, world, upstream)
    if observe is None:
        result = prepared.launch()
    else:
        with observe(prepared.territories) as seen:
            result = prepared.launch()
        prepared.run.accesses = seen.accesses if seen.launches else None
    upstream[OPS[kernel.op].outputs[0]] = result
    return prepared.take(result)


def prepare(kernel: Kernel, inputs: Inputs, world: World, upstream: Mapping[str, Tensor] = {}) -> Prepared:
    """Make the physical tensors of one call; `upstream` holds the results of earlier ops of a chain."""
    from m3check import paging

    op = kernel.op
    accepted = check_signature(op, kernel.function, kernel.name)
    device = next(t for t in (inputs.idx_q, inputs.q, inputs.scores) if t is not None).device
    reads_index = "index_kv_cache" in SIGNATURES[op][0]
    salted = replace(inputs.case, op=world.salt)
    if world.layout:
        inputs = replace(inputs, case=replace(inputs.case, layout=world.layout))
    case = inputs.case
    first = paging.far_page(case, reads_index) if world.far else 0
    pages = paging.Pages.shuffled(salted, "index" if reads_index else "main", device, world, first)
    query_len = max(case.query_lens, default=1)  # a decode batch of no requests still has one
    starts = [request.query_start for request in case.requests()] + [case.total_queries]

    arguments: dict[str, Any] = {
        "block_table": pages.table,
        "cu_seqlens_q": paging.lengths(starts, device),
        "seq_lens": paging.lengths(case.kv_lens, device),
        "prefix_lens": paging.lengths([request.prefix for request in case.requests()], device),
        "max_query_len": query_len,
        "max_seq_len": world.max_seq_len or max(case.context, 1),
        "num_kv_heads": case.kv_heads,
        "topk": case.topk,
        "init_blocks": case.init_blocks,
        "local_blocks": case.local_blocks,
        "decode_query_len": query_len,
        "max_decode_query_len": max(world.max_query_len or case.max_query_len, query_len),
        "sm_scale": inputs.sm_scale,
    }
    if reads_index:
        arguments["idx_q"] = _owned_copy(inputs.idx_q)
        arguments["index_kv_cache"] = paging.pack_index_cache(inputs, pages, world.poison)
    if op == "index_topk":
        arguments["score"] = upstream["score"] if "score" in upstream else _physical_scores(inputs, world)
    if "q" in SIGNATURES[op][0]:
        arguments["q"] = _queries(inputs, world)
        arguments["kv_cache"] = paging.pack_main_cache(inputs, pages, kernel.profile.kv_layout, world.poison)
        arguments["topk_idx"] = upstream["ids"] if "ids" in upstream else _owned_copy(inputs.topk_idx)
        arguments["k_scale"] = paging.pack_scale(inputs.k_scale, case, pages, world.poison)
        arguments["v_scale"] = paging.pack_scale(inputs.v_scale, case, pages, world.poison)

    run = paging.Run({})
    frozen_names = ("idx_q", "index_kv_cache", "score", "q", "kv_cache", "topk_idx", "k_scale", "v_scale", "block_table",
                    "cu_seqlens_q", "seq_lens", "prefix_lens")  # fmt: skip
    watched = [name for name in frozen_names if name in accepted and arguments.get(name) is not None]
    run.frozen = [paging.Frozen.of(name, arguments[name], _touched(name, arguments[name], pages)) for name in watched]
    if world.own_buffers:
        accepted -= _without(kernel.function)
    buffers = _buffers(op, inputs, accepted, device, world)
    run.guards = list(buffers.values())
    arguments |= {name: guard.view for name, guard in buffers.items()}
    if world.far_rows:
        for name, dim in TOKEN_DIMENSION.items():
            if name in accepted and arguments.get(name) is not None and arguments[name].numel():
                arguments[name] = paging.with_far_rows(arguments[name], dim)
                if name in buffers:
                    buffers[name].view = arguments[name]
    if world.apart:
        for name in CHANNELLED & accepted & {name for name, value in arguments.items() if value is not None}:
            arguments[name] = paging.apart(arguments[name])
            if name in buffers:
                buffers[name].view = arguments[name]
    if world.odd_strides:
        tensors = {name: value for name, value in arguments.items() if hasattr(value, "as_strided")}
        arguments |= {name: paging.oddly_strided(value) for name, value in tensors.items()}
    arguments = {name: arguments[name] for name in accepted if name in arguments}
    return Prepared(kernel, inputs, arguments, buffers, run, _territories(arguments, buffers.keys(), pages, case))


def _territories(arguments: Mapping[str, Any], outputs: Container[str], pages: Pages, case: Case) -> tuple[Territory, ...]:
    """Which cells of its arguments a kernel may read: all of a view, but of caches the pages that a request owns.

    Whole pages, since kernels load a page whole and hide its dead slots; whole rows of a block table, though following a
    column past a request's last block leads to a page that nobody owns.
    """
    from m3check.paging import Territory
    from m3check.types import BLOCK

    def owned(name: str, tensor: Tensor) -> Tensor | None:
        if name in ("index_kv_cache", "kv_cache"):
            return pages.readable(case)
        if name in ("k_scale", "v_scale") and tensor.dim() == 2:
            return pages.readable(case).repeat_interleave(BLOCK).expand(tensor.shape[0], -1)
        return None

    tensors = {name: value for name, value in arguments.items() if hasattr(value, "as_strided")}
    return tuple(Territory(name, t, owned(name, t), name in outputs, name in FRESH) for name, t in tensors.items())


def _touched(name: str, tensor: Tensor, pages: Pages) -> Tensor | None:
    """The part of a vast tensor that is in use; None where all of it is."""
    from m3check.types import BLOCK

    if not pages.first:
        return None
    if name in ("index_kv_cache", "kv_cache"):
        return tensor[pages.first :]
    if name in ("k_scale", "v_scale") and tensor.dim() == 2:
        return tensor[:, pages.first * BLOCK :]
    return None


def _without(function: Callable[..., Any]) -> frozenset[str]:
    """The buffers that a kernel makes itself where none is given; raises M3CheckError where it needs all of them."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    own = frozenset(n for n in RESULT_IN.values() if n in parameters and parameters[n].default is None)
    if not own:
        raise M3CheckError(f"{function} has no buffer that it can do without")
    return own


def _logical(kernel: Kernel, name: str, result: Any, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """Check a result's shape and dtype; copies of its logical cells, and of the score columns past them."""
    import torch

    case = inputs.case
    wanted: tuple[tuple[int, ...], tuple[torch.dtype, ...]] = {
        "score": ((case.kv_heads, case.total_queries, case.block_columns), (torch.float32,)),
        "ids": ((case.kv_heads, case.total_queries, case.topk), (torch.int32, torch.int64)),
        "out": ((case.total_queries, case.heads, case.head_dim), (inputs.q.dtype,) if inputs.q is not None else ()),
    }[name]
    shape, dtypes = wanted
    if not isinstance(result, torch.Tensor):
        raise BrokenContract(f"{kernel.name} returned {type(result).__name__}, wanted a tensor {list(shape)}")
    fits = result.dim() == len(shape) and result.shape[:-1] == shape[:-1]
    fits = fits and (result.shape[-1] >= shape[-1] if name == "score" else result.shape[-1] == shape[-1])
    if name == "ids" and result.dim() == 3:  # rows past T belong to somebody else
        fits = result.shape[0] == shape[0] and result.shape[1] >= shape[1] and result.shape[2] == shape[2]
    if not fits:
        raise BrokenContract(f"{kernel.name} gave {name} of shape {list(result.shape)}, wanted {list(shape)}")
    if result.dtype not in dtypes:
        raise BrokenContract(f"{kernel.name} gave {name} as {result.dtype}, wanted {dtypes[0]}")
    beyond = None
    if name == "score":
        beyond = result[..., shape[-1] :].detach().clone()
        result = result[..., : shape[-1]]
    if name == "ids":
        result = result[:, : shape[1]]
    return result.detach().clone(), beyond


def _buffers(op: str, inputs: Inputs, accepted: frozenset[str], device: Any, world: World) -> dict[str, Guard]:
    """The buffers that a kernel writes into, by keyword, the one that holds its result first."""
    import torch

    from m3check import paging

    case, strided = inputs.case, inputs.case.layout == "pool"
    unwritten = paging.poison_value(torch.float32, world.poison)
    buffers: dict[str, Guard] = {}
    if "output" in accepted:
        assert inputs.q is not None
        shape = [case.total_queries, case.heads, case.head_dim]
        buffers["output"] = paging.guarded("output", shape, unwritten, inputs.q.dtype, device, strided=strided)
    if "out" in accepted:
        shape = [case.kv_heads, case.total_queries, case.topk]
        stale = paging.IMPOSSIBLE_ID if world.poison == "nan" else 0
        spare = paging.SPARE_ROWS if strided else 0
        buffers["out"] = paging.guarded("out", shape, stale, torch.int32, device, strided=strided, spare=spare)
    if "score_out" in accepted:
        shape = [case.kv_heads, case.total_queries, -(-case.block_columns // 16) * 16]
        buffers["score_out"] = paging.guarded("score_out", shape, unwritten, torch.float32, device, strided=strided)
    return buffers


def _queries(inputs: Inputs, world: World) -> Tensor:
    """Attention queries; in a pool layout they are a slice of a fused QKV row, as a model would have them."""
    from m3check import paging

    q, case = inputs.q, inputs.case
    assert q is not None
    if case.layout != "pool":
        return q.clone()
    shape = [case.total_queries, case.heads + 2 * case.kv_heads, case.head_dim]
    fused = paging.filled(shape, paging.poison_value(q.dtype, world.poison), q.dtype, q.device)
    fused[:, : case.heads] = q
    return fused[:, : case.heads]


def _owned_copy(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.clone()


def _physical_scores(inputs: Inputs, world: World) -> Tensor:
    """Scores [H, T, K] with 16-divisible rows; cells of invisible blocks hold poison, which a kernel must not read."""
    import torch

    from m3check import paging

    scores, case = inputs.scores, inputs.case
    assert scores is not None
    columns = max(16, -(-case.block_columns // 16) * 16)
    poison = paging.poison_value(torch.float32, world.poison)
    wide = torch.full((*scores.shape[:2], columns), poison, dtype=torch.float32, device=scores.device)
    wide[..., : case.block_columns] = scores
    block = torch.arange(case.block_columns, device=scores.device)
    for request in case.requests():
        for i in range(request.query_len):
            row = wide[:, request.query_start + i, : case.block_columns]
            row[:, block >= request.visible_blocks(i)] = poison
    return wide
