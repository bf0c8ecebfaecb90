"""One step of a mixed batch through an implementation of the op `indexer`, and what is seen of it beside its results.

Before the step another batch is built (and served, where a World asks for it), so that what must stay where it is can be
told from what moved. `batches` says which, `memory` has the tensors, `metadata` reads what an implementation builds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from m3check.kernels.indexer.batches import Rows, earlier
from m3check.kernels.indexer.memory import Memory
from m3check.kernels.indexer.metadata import moved, plain, tensors, unset
from m3check.kernels.serving import Implementation
from m3check.types import Inputs, Kernel, M3CheckError

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.kernels.contract import Observe
    from m3check.paging import Run, World


class Interrupted(Exception):
    """A step whose launches raised, which is the cause of this; `run` is what was seen until then."""

    def __init__(self, run: Run) -> None:
        super().__init__("the step did not end")
        self.run = run


def call(kernel: Kernel, inputs: Inputs, world: World, observe: Observe | None = None) -> Run:
    """Run one step; ids are read from the persistent buffer, in the layout that it was allocated with."""
    from m3check import paging

    if world.layout:
        inputs = replace(inputs, case=replace(inputs.case, layout=world.layout))
    step = _Step(kernel, inputs, world)
    memory, served, tokens = step.memory, step.served, inputs.case.total_queries
    metadata = step.metadata()
    held = list(tensors(metadata))
    run = paging.Run({}, served=served)
    run.guards = [memory.ids, memory.scores, memory.output]
    run.frozen = [paging.Frozen.of(name, tensor) for name, tensor in memory.inputs(held)]
    raised: Exception | None = None
    returned: Sequence[Tensor | None] = ()
    with observe(memory.territories(held)) if observe else nullcontext() as seen:
        try:
            returned = step.forward(metadata)
        except M3CheckError:
            raise
        except Exception as error:  # what the kernels were given may say why
            raised = error
    if seen is not None:
        run.accesses = seen.accesses if seen.launches else None
    served.index, served.main = (plain(m) for m in metadata)
    served.returned = [_returned(name, part, memory) for name, part in zip(("decode", "prefill"), returned, strict=False)]
    if step.implementation.keeps_scores:
        served.scores = memory.scores.view[:, :tokens].clone()
    run.outputs["ids"] = memory.head_major[:, :tokens].clone()
    output = memory.output.view[:tokens]
    run.outputs["out"] = output.unflatten(1, (-1, inputs.case.head_dim)).clone()
    if raised is not None:
        raise Interrupted(run) from raised
    return run


class _Step:
    """An implementation over the tensors of one call, and what is seen of it."""

    def __init__(self, kernel: Kernel, inputs: Inputs, world: World) -> None:
        from m3check import paging

        self.case, self.world, self.name = inputs.case, world, kernel.name
        self.memory, self.served = Memory(kernel, inputs, world), paging.Served()
        self.implementation: Implementation = kernel.function(self.memory.figures, self.memory.buffers)
        self.replay: Callable[[], Sequence[Tensor | None]] | None = None

    def metadata(self) -> tuple[Any, Any]:
        """Metadata of the step; where the world says `stale` or `captured`, those of the batch before it, whose memory is
        the same. A captured step was launched, and its graph made, when that memory still held the batch before."""
        import torch

        from m3check import paging
        from m3check.kernels.syncs import Watch

        first = self.implementation.build(self.memory.filled(earlier(self.case, self.world.earlier)))
        if self.world.earlier == "other":  # its rows are cut from the same queries, so that ids and scores are some
            self.implementation.forward(first, self.memory.tensors)
            self.memory.output.reset()
        if self.world.earlier == "captured":
            self.replay = self._captured(first)
        before = dict(tensors(first))
        for tensor in before.values():
            if tensor.is_floating_point():  # scores, as a step leaves them
                tensor.fill_(paging.poison_value(tensor.dtype, "garbage"))
        batch = self.memory.filled(Rows.of(self.case))
        host = [batch.query_starts_host, batch.seq_lens_host]
        device = [getattr(batch, each.name) for each in dataclasses.fields(batch)]
        device = [each for each in device if isinstance(each, torch.Tensor) and all(each is not held for held in host)]
        with Watch(device, host) as watch:
            second = self.implementation.build(batch)
        self.served.waits = [f"build: {place}" for place in watch.found]
        after = dict(tensors(second))
        self.served.moved = moved(before, after)
        self.served.slots = batch.slots.tolist()
        self.served.tables = {"index": batch.index_table.tolist(), "main": batch.main_table.tolist()}
        self.served.unset = [name for name, tensor in after.items() if unset(tensor)]
        return first if self.world.earlier in ("stale", "captured") else second

    def _captured(self, metadata: tuple[Any, Any]) -> Callable[[], Sequence[Tensor | None]]:
        """Capture a step in a CUDA graph; what replays it and returns the lists that the captured step returned."""
        import torch

        from m3check.kernels.replay import captured

        graph, returned = captured(lambda: self.implementation.forward(metadata, self.memory.tensors), self.name)
        self.memory.output.reset()

        def replay() -> Sequence[Tensor | None]:
            graph.replay()
            torch.cuda.synchronize(self.memory.device)
            return returned

        return replay

    def forward(self, metadata: tuple[Any, Any]) -> Sequence[Tensor | None]:
        """Launch the step; host code that waits for the device is noted."""
        from m3check.kernels.syncs import Watch

        if self.replay is not None:
            return self.replay()
        memory = self.memory
        device = [tensor for tensor in vars(memory.tensors).values() if tensor is not None]
        device += [memory.ids.view, memory.scores.view, *(tensor for _, tensor in tensors(metadata))]
        with Watch(device, []) as watch:
            returned = self.implementation.forward(metadata, memory.tensors)
        self.served.waits += [f"forward: {place}" for place in watch.found]
        return returned


def _returned(name: str, part: Tensor | None, memory: Memory) -> tuple[list[int], bool, int | None, bool] | None:
    """What `Served.returned` says of a returned list."""
    import torch

    if part is None:
        return None
    whole, tokens = memory.head_major, memory.case.total_queries
    rows = sum(memory.case.query_lens[: memory.case.decodes])
    wanted = whole[:, :rows] if name == "decode" else whole[:, rows:tokens]
    inside = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    first = (part.storage_offset() - whole.storage_offset()) // whole.stride(1) if inside and part.numel() else None
    return list(part.shape), inside, first, part.shape == wanted.shape and bool(torch.equal(part, wanted))
