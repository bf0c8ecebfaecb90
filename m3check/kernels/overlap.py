"""Launches that overlap on a device: many in flight on two streams, or each behind a slow kernel that writes its ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from m3check.kernels import calls
from m3check.kernels.replay import launch, stages, taken
from m3check.types import Inputs, Kernel

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.kernels.contract import Prepared
    from m3check.paging import Run, World

HELD = 20_000_000
"""Clock cycles, some 10 ms, for which streams wait: until then everything is enqueued, so that it really overlaps."""

BUSY = 1 << 25
"""Elements of a vector that is added to meanwhile: enough blocks to fill any GPU."""

ROUNDS = 50

HANDED_OVER = ("seq_lens", "context_lens", "topk_idx", "qkv")
"""What an earlier kernel of a model writes, and a dependent launch must not read before its wait."""


def in_flight(kernel: Kernel, lanes: Sequence[tuple[Inputs, World]], count: int) -> list[tuple[int, Run]]:
    """`count` launches without waiting, one lane (a stream with inputs and buffers of its own) after another.

    They start together, on a GPU that other work fills for a while. A kernel that works in place finds its tensors changed
    by the launch before, so that each launch has its own. Returns (lane, its run) in the order of the launches.
    """
    import torch

    prepared = [stages(kernel, *lanes[i % len(lanes)]) for i in range(count if calls.of(kernel.op).held else len(lanes))]
    busy = torch.zeros(BUSY, device=_device(prepared[0]))
    streams = [torch.cuda.Stream() for _ in lanes]
    other = torch.cuda.Stream()
    for stream in (*streams, other):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(HELD)
    with torch.cuda.stream(other):
        for _ in range(ROUNDS):
            busy.add_(1.0)
    kept: list[tuple[int, list[Any]]] = []
    for i in range(count):
        with torch.cuda.stream(streams[i % len(lanes)]):
            kept.append((i, [_copied(result) for result in launch(prepared[i % len(prepared)])]))
    torch.cuda.synchronize()
    return [(i % len(lanes), taken(prepared[i % len(prepared)], results, lanes[i % len(lanes)][0])) for i, results in kept]


def behind_producer(kernel: Kernel, inputs: Inputs, count: int) -> list[Run]:
    """`count` calls, each right behind a slow kernel that writes its lengths, ids or rows, which until then are others.

    Outputs and scratch hold what calls before left or poison. A kernel that is launched early and does not wait before it
    reads computes something else.
    """
    import torch

    from m3check.kernels import producer
    from m3check.paging import World

    prepared = stages(kernel, inputs, World())
    live, right, stale = _handed_over(prepared, inputs)
    zero = torch.zeros(1, dtype=torch.int32, device=live.device)
    kept = []
    with _unfilled():  # a fill between two kernels would keep the second from starting early
        producer.produce(live, right, zero)  # compiled before it counts
        for _ in range(count):
            live.copy_(stale)
            for stage in prepared:
                for buffer in stage.buffers.values():
                    buffer.reset()
            torch.cuda._sleep(HELD)
            producer.produce(live, right, zero)
            kept.append(taken(prepared, launch(prepared), inputs))
        torch.cuda.synchronize()
    return kept


def _handed_over(prepared: Sequence[Prepared], inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """One tensor in which all lengths, ids and rows of the stages now live, its right contents and others in bounds."""
    import torch

    found = [
        (stage, name, stage.arguments[name])
        for stage in prepared
        for name in HANDED_OVER
        if name in stage.arguments and stage.arguments[name].numel()
    ]
    starts, size = [], 0
    for _, _, tensor in found:
        starts.append(size)
        size += -(-_bits(tensor).numel() // 64) * 64  # keeps the alignment that a kernel was compiled for
    live = torch.zeros(size, dtype=torch.int32, device=_device(prepared))
    right, stale = torch.zeros_like(live), torch.zeros_like(live)
    queries = max(inputs.case.query_lens, default=0)
    for start, (stage, name, tensor) in zip(starts, found, strict=True):
        cells = slice(start, start + _bits(tensor).numel())
        right[cells] = _bits(tensor)
        if name == "topk_idx":  # block 0 alone
            others = torch.full_like(tensor, -1)
            others[..., 0] = 0
        elif name == "qkv":  # rows and heads of others
            others = tensor.flip(0, 1)
        else:
            others = tensor.clamp(max=queries)
        stale[cells] = _bits(others)
        stage.arguments[name] = live[cells].view(tensor.dtype).view(tensor.shape)
        if name in stage.buffers:  # worked on in place: what is read there afterwards
            stage.buffers[name].view = stage.arguments[name]
    return live, right, stale


def _bits(tensor: Tensor) -> Tensor:
    """Its contents as int32, flat."""
    import torch

    return tensor.contiguous().view(torch.int32).flatten()


def _copied(result: Any) -> Any:
    """A result that later launches may write over; some ops give several tensors."""
    return tuple(each.clone() for each in result) if isinstance(result, tuple | list) else result.clone()


def _device(prepared: Sequence[Prepared]) -> Any:
    return next(value.device for value in prepared[0].arguments.values() if hasattr(value, "device"))


@contextmanager
def _unfilled() -> Iterator[None]:
    """torch.empty leaves memory as it is, inside a block of `runner.filled_memory` too."""
    import torch

    settings: Any = torch.utils.deterministic
    before = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before
