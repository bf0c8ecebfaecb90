"""One step of a mixed batch through an implementation of the op `indexer`, and what is seen of it beside its results.

The implementation, its persistent buffers and the memory that holds lengths and tables are made for a larger batch than the
case. Before the step another batch is built (and served, where a World asks for it), so that what must stay where it is can
be told from what moved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from m3check.kernels.serving import Batch, Buffers, Figures, Implementation, Tensors
from m3check.types import BLOCK, Case, Inputs, Kernel, blocks

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.kernels.contract import Observe
    from m3check.paging import Guard, Pages, Run, World

SPARE_TOKENS, SPARE_REQUESTS = 5, 3
"""What the largest batch has more than the case."""

CAPTURED = (".prefix_lens", ".context_lens", ".unified_scores", ".topk_num_valid_pages", ".topk_prefix_lens",
            ".topk_cu_seqlens_q", ".page16_slot_mapping")  # fmt: skip
"""Tensors of metadata that a captured graph reads, beside those of the decoded part."""


def call(kernel: Kernel, inputs: Inputs, world: World, observe: Observe | None = None) -> Run:
    """Run one step; ids are read from the persistent buffer, in the layout that it was allocated with."""
    from m3check import paging

    if world.layout:
        inputs = replace(inputs, case=replace(inputs.case, layout=world.layout))
    step = _Stage(kernel, inputs, world)
    served, tokens = paging.Served(), inputs.case.total_queries
    metadata = step.metadata(served)
    run = paging.Run({}, served=served)
    run.guards = [step.ids, step.scores, step.output]
    run.frozen = [paging.Frozen.of(name, tensor) for name, tensor in step.inputs(metadata)]
    if observe is None:
        returned = step.forward(metadata, served)
    else:
        with observe(step.territories(metadata)) as seen:
            returned = step.forward(metadata, served)
        run.accesses = seen.accesses if seen.launches else None
    served.index, served.main = (_plain(m) for m in metadata)
    served.returned = [_returned(name, part, step) for name, part in zip(("decode", "prefill"), returned, strict=False)]
    run.outputs["ids"] = step.head_major[:, :tokens].clone()
    output = step.output.view[:tokens]
    run.outputs["out"] = output.unflatten(1, (-1, inputs.case.head_dim)).clone()
    return run


class _Stage:
    """The physical tensors of one call."""

    def __init__(self, kernel: Kernel, inputs: Inputs, world: World) -> None:
        import torch

        from m3check import paging

        case = inputs.case
        assert inputs.idx_q is not None
        assert inputs.q is not None
        self.case, self.world, self.device = case, world, inputs.device
        self.max_tokens = case.total_queries + SPARE_TOKENS
        self.max_requests = len(case.kv_lens) + SPARE_REQUESTS
        self.max_seq_len = world.max_seq_len or max(case.context, 1)
        self.longest_decode = max(case.max_query_len, 1)
        salted = replace(case, op=world.salt)
        self.pages = {
            name: paging.Pages.shuffled(salted, name, self.device, world) for name in ("index", "main")
        }  # two cache groups
        self.ids, self.scores, self.output = self._buffers(kernel.function.layout, inputs)  # type: ignore[attr-defined]
        ids = self.ids.view
        self.head_major = ids.transpose(0, 1) if kernel.function.layout == "token" else ids  # type: ignore[attr-defined]
        self.tensors = Tensors(
            self._padded(inputs.idx_q),
            paging.pack_index_cache(inputs, self.pages["index"], world.poison),
            self._padded(inputs.q),
            paging.pack_main_cache(inputs, self.pages["main"], kernel.profile.kv_layout, world.poison),
            paging.pack_scale(inputs.k_scale, case, self.pages["main"], world.poison),
            paging.pack_scale(inputs.v_scale, case, self.pages["main"], world.poison),
            self.output.view,
        )
        figures = Figures(
            case.kv_heads, case.heads, case.head_dim, case.topk, case.init_blocks, case.local_blocks, inputs.sm_scale,
            case.index_cache_dtype, case.cache_dtype, self.max_tokens, self.max_requests, self.max_seq_len,
            self.longest_decode, self.device,
        )  # fmt: skip
        self.starts = torch.zeros(self.max_requests + 1, dtype=torch.int32, device=self.device)
        self.lengths = torch.zeros(self.max_requests, dtype=torch.int32, device=self.device)
        self.positions, self.slots = (torch.zeros(self.max_tokens, dtype=torch.int64, device=self.device) for _ in "ps")
        self.tables = {name: _persistent(pages, self.max_requests) for name, pages in self.pages.items()}
        self.implementation: Implementation = kernel.function(figures, Buffers(ids, self.scores.view))
        self.name = kernel.name
        self.replay: Callable[[], Sequence[Tensor | None]] | None = None

    def _buffers(self, layout: str, inputs: Inputs) -> tuple[Guard, Guard, Guard]:
        import torch

        from m3check import paging

        case, tokens, rows = self.case, self.case.total_queries, self.max_tokens
        assert inputs.q is not None
        poison = paging.poison_value(torch.float32, self.world.poison)
        stale = paging.IMPOSSIBLE_ID if self.world.poison == "nan" else 0
        shape, dim = ([case.kv_heads, rows, case.topk], 1) if layout == "head" else ([rows, case.kv_heads, case.topk], 0)
        ids = paging.guarded("id buffer", shape, stale, torch.int32, self.device)
        ids.own(dim, tokens)
        columns = -(-max(1, blocks(self.max_seq_len)) // 16) * 16
        scores = paging.guarded("score buffer", [case.kv_heads, rows, columns], poison, torch.float32, self.device)
        scores.own(1, tokens)
        width = case.heads * case.head_dim
        output = paging.guarded("output", [rows, width], poison, inputs.q.dtype, self.device)
        output.own(0, tokens)
        return ids, scores, output

    def _padded(self, tensor: Tensor) -> Tensor:
        """[T, heads, D] as [max_tokens, heads · D], poison in the rows past T."""
        from m3check import paging

        poison = paging.poison_value(tensor.dtype, self.world.poison)
        flat = tensor.flatten(1)
        padded = paging.filled([self.max_tokens, flat.shape[1]], poison, tensor.dtype, tensor.device)
        words = paging.words(padded)
        words[: len(flat)] = paging.words(flat)
        return padded

    def filled(self, batch: _Rows) -> Batch:
        """The persistent lengths and tables with a batch in them, and views of its part."""
        import torch

        count = len(batch.kv_lens)
        starts = [0]
        for length in batch.query_lens:
            starts.append(starts[-1] + length)
        starts_host, lengths_host = (torch.tensor(values, dtype=torch.int32) for values in (starts, batch.kv_lens))
        self.starts[: count + 1] = starts_host.to(self.device)
        self.lengths[:count] = lengths_host.to(self.device)
        for name, table in self.tables.items():
            table[:count] = self.pages[name].table[list(batch.requests)]
        tokens, placed = starts[-1], batch.placed(self.pages["main"])
        for held, values in ((self.positions, placed[0]), (self.slots, placed[1])):
            held[:tokens] = torch.tensor(values, dtype=torch.int64, device=self.device)
        return Batch(
            self.starts[: count + 1], starts_host, self.lengths[:count], lengths_host,
            self.tables["index"][:count], self.tables["main"][:count], self.positions[:tokens], self.slots[:tokens],
            max(batch.query_lens), self.max_seq_len,
        )  # fmt: skip

    def metadata(self, served: Any) -> tuple[Any, Any]:
        """Metadata of the step; where the world says `stale` or `captured`, those of the batch before it, whose memory is
        the same. A captured step was launched, and its graph made, when that memory still held the batch before."""
        import torch

        from m3check import paging
        from m3check.kernels.syncs import Watch

        earlier = _earlier(self.case, self.world.earlier)
        first = self.implementation.build(self.filled(earlier))
        if self.world.earlier == "other":  # its rows are cut from the same queries, so that ids and scores are some
            self.implementation.forward(first, self.tensors)
            self.output.reset()
        if self.world.earlier == "captured":
            self.replay = self._captured(first)
        addresses = dict(_tensors(first))
        for tensor in addresses.values():
            if tensor.is_floating_point():  # scores, as a step leaves them
                tensor.fill_(paging.poison_value(tensor.dtype, "garbage"))
        batch = self.filled(_Rows.of(self.case))
        host = [batch.query_starts_host, batch.seq_lens_host]
        device = [getattr(batch, each.name) for each in dataclasses.fields(batch)]
        device = [each for each in device if isinstance(each, torch.Tensor) and all(each is not held for held in host)]
        with Watch(device, host) as watch:
            second = self.implementation.build(batch)
        served.waits = [f"build: {place}" for place in watch.found]
        after = dict(_tensors(second))
        served.moved = _moved(addresses, after)
        served.slots = batch.slots.tolist()
        served.unset = [name for name, tensor in after.items() if _kept_scores(tensor)]
        return first if self.world.earlier in ("stale", "captured") else second

    def _captured(self, metadata: tuple[Any, Any]) -> Callable[[], Sequence[Tensor | None]]:
        """Capture a step in a CUDA graph; what replays it and returns the lists that the captured step returned."""
        import torch

        from m3check.kernels.replay import captured

        graph, returned = captured(lambda: self.implementation.forward(metadata, self.tensors), self.name)
        self.output.reset()

        def replay() -> Sequence[Tensor | None]:
            graph.replay()
            torch.cuda.synchronize(self.device)
            return returned

        return replay

    def forward(self, metadata: tuple[Any, Any], served: Any) -> Sequence[Tensor | None]:
        """Launch the step; host code that waits for the device is noted."""
        from m3check.kernels.syncs import Watch

        if self.replay is not None:
            return self.replay()
        device = [tensor for tensor in vars(self.tensors).values() if tensor is not None]
        device += [self.ids.view, self.scores.view, *(tensor for _, tensor in _tensors(metadata))]
        with Watch(device, []) as watch:
            returned = self.implementation.forward(metadata, self.tensors)
        served.waits += [f"forward: {place}" for place in watch.found]
        return returned

    def inputs(self, metadata: tuple[Any, Any]) -> list[tuple[str, Tensor]]:
        """What a step reads and must not write, by name; scores that metadata hold are written."""
        own = ((name, tensor) for name, tensor in vars(self.tensors).items() if name != "output" and tensor is not None)
        return [*own, *((name, tensor) for name, tensor in _tensors(metadata) if not tensor.is_floating_point())]

    def territories(self, metadata: tuple[Any, Any]) -> tuple[Any, ...]:
        """What the kernels may do with each tensor; of caches and scales they may read the pages of the requests."""
        from m3check.paging import Territory

        def owned(name: str, tensor: Tensor) -> Tensor | None:
            if name == "index_kv_cache":
                return self.pages["index"].readable(self.case)
            mask = self.pages["main"].readable(self.case)
            if name == "kv_cache":
                return mask
            if name in ("k_scale", "v_scale") and tensor.dim() == 2:
                return mask.repeat_interleave(BLOCK).expand(tensor.shape[0], -1)
            return None

        tokens = self.case.total_queries
        rows = {"idx_q", "q"}  # padding behind a batch's rows belongs to nobody
        read = [
            Territory(name, tensor[:tokens] if name in rows else tensor, owned(name, tensor))
            for name, tensor in self.inputs(metadata)
        ]
        written = (("id buffer", self.head_major[:, :tokens]), ("score buffer", self.scores.view[:, :tokens]),
                   ("output", self.output.view[:tokens]))  # fmt: skip
        return (*read, *(Territory(name, tensor, output=True) for name, tensor in written))


@dataclass(frozen=True)
class _Rows:
    """A batch of some of the case's requests, with lengths of its own."""

    requests: tuple[int, ...]
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]

    @classmethod
    def of(cls, case: Case) -> _Rows:
        return cls(tuple(range(len(case.kv_lens))), case.query_lens, case.kv_lens)

    def placed(self, pages: Pages) -> tuple[list[int], list[int]]:
        """(position, slot) of each query token; 0 and -1 in rows that see no token."""
        table = pages.table.tolist()
        positions, slots = [], []
        for request, query_len, kv_len in zip(self.requests, self.query_lens, self.kv_lens, strict=True):
            for position in range(kv_len - query_len, kv_len):
                page, offset = divmod(max(position, 0), BLOCK)
                positions.append(max(position, 0))
                slots.append(table[request][page] * BLOCK + offset if position >= 0 else -1)
        return positions, slots


def _earlier(case: Case, how: str) -> _Rows:
    """The batch before: as many requests with half their tokens, `other` with another number of decoded ones.

    Stale metadata are of a batch of the same shape. Lengths are never below the number of queries, nor 0: what was captured
    was alive.
    """
    halves = tuple(max(q, kv // 2) for q, kv in zip(case.query_lens, case.kv_lens, strict=True))
    whole = _Rows(tuple(range(len(halves))), case.query_lens, halves)
    if how != "other":
        return whole
    n = case.decodes
    live = [i for i, kv in enumerate(case.kv_lens) if kv >= case.query_lens[i]] or [0]
    if n < len(case.kv_lens) and n:  # every request as a decode: more decoded rows than this batch has
        chosen, length = [i for i in range(len(case.kv_lens)) if i in live], case.query_lens[0]
        lengths = [min(length, case.query_lens[i]) for i in chosen]
        chosen = [i for i, q in zip(chosen, lengths, strict=True) if q == length]
        return _Rows(tuple(chosen), (length,) * len(chosen), tuple(case.kv_lens[i] for i in chosen))
    chosen = live[: max(1, len(live) // 2)]  # fewer requests
    return _Rows(tuple(chosen), tuple(case.query_lens[i] for i in chosen), tuple(case.kv_lens[i] for i in chosen))


def _persistent(pages: Pages, requests: int) -> Tensor:
    """A block table for `requests` rows; those of nobody name the page that the last row's unused columns name."""
    table = pages.table
    wide = table[-1:, -1:].expand(requests, table.shape[1]).clone()
    wide[: len(table)] = table
    return wide


def _tensors(metadata: tuple[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a pair of metadata objects, by the path of attributes that leads to it."""
    import torch

    def walk(name: str, held: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
        if isinstance(held, torch.Tensor):
            yield name, held
        elif depth and held is not None and not isinstance(held, int | float | str | bool):
            for key, value in _attributes(held).items():
                yield from walk(f"{name}.{key}", value, depth - 1)

    for name, held in zip(("index", "main"), metadata, strict=True):
        yield from walk(name, held, 3)


def _attributes(held: Any) -> dict[str, Any]:
    if isinstance(held, dict):
        return held
    if dataclasses.is_dataclass(held):
        return {field.name: getattr(held, field.name) for field in dataclasses.fields(held)}
    return {name: value for name, value in getattr(held, "__dict__", {}).items() if not name.startswith("_")}


def _plain(held: Any) -> Any:
    """A metadata object as nested dicts of figures and (dtype, values); what is neither is left out."""
    import torch

    if isinstance(held, torch.Tensor):  # of scores the step's own outputs tell
        return None if held.is_floating_point() else (str(held.dtype).removeprefix("torch."), held.tolist())
    if isinstance(held, int | float | bool) or held is None:
        return held
    return {name: plain for name, value in _attributes(held).items() if (plain := _plain(value)) is not None}


def _moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Tensors that a captured graph reads and that do not lie where those of the batch before lay."""
    found = []
    for name, tensor in after.items():
        captured = ".decode." in name or name.endswith(CAPTURED)
        old = before.get(name)
        if captured and old is not None and tensor.numel() and old.numel() and _storage(old) != _storage(tensor):
            found.append(name)
    return found


def _kept_scores(tensor: Tensor) -> bool:
    """Whether a score buffer that metadata hold was not filled with -inf, so that a block of nobody could be chosen."""
    return tensor.is_floating_point() and bool((tensor != float("-inf")).any())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _returned(name: str, part: Tensor | None, step: _Stage) -> tuple[str, list[int], bool, bool] | None:
    """(part, shape, whether it lies in the persistent buffer, whether it is that part's rows of it) of a returned list."""
    import torch

    if part is None:
        return None
    rows = sum(step.case.query_lens[: step.case.decodes])
    tokens = step.case.total_queries
    wanted = step.head_major[:, :rows] if name == "decode" else step.head_major[:, rows:tokens]
    fits = part.shape == wanted.shape and bool(torch.equal(part, wanted))
    return name, list(part.shape), _storage(part) == _storage(step.ids.view), fits
