"""Other ways to launch a kernel on a device than to call it: out of a captured graph, and many at once on two streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from m3check.kernels.contract import Prepared, prepare
from m3check.types import OPS, Inputs, Kernel, M3CheckError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from m3check.paging import Run, World


class CannotCapture(M3CheckError):
    """A kernel that cannot be part of a CUDA graph, for instance because it reads a length on the host."""


def _stages(kernel: Kernel, inputs: Inputs, world: World) -> list[Prepared]:
    """The calls of a kernel, or of a chain's kernels in order, ready to launch; `_launch` hands results over."""
    import torch

    upstream: dict[str, Tensor] = {}
    stages = []
    for op in OPS[kernel.op].chain or (kernel.op,):
        part = kernel.parts.get(op, kernel)
        stages.append(prepare(part, inputs, world, upstream))
        upstream[OPS[op].outputs[0]] = torch.empty(0)
    return stages


def _launch(stages: Sequence[Prepared]) -> list[Any]:
    """Launch a chain's stages, each on the results of those before it."""
    passed: dict[str, Any] = {}
    results = []
    for stage in stages:
        stage.arguments |= {name: value for name, value in passed.items() if name in stage.arguments}
        result = stage.launch()
        passed |= {"ids": {"topk_idx": result}, "score": {"score": result}}.get(OPS[stage.kernel.op].outputs[0], {})
        results.append(result)
    return results


def _taken(stages: Sequence[Prepared], results: Sequence[Any], inputs: Inputs) -> Run:
    from m3check.paging import Run

    total = Run({})
    for stage, result in zip(stages, results, strict=True):
        stage.inputs, stage.run.outputs, stage.run.beyond = inputs, {}, {}
        run = stage.take(result)
        total.outputs |= run.outputs
        total.guards += run.guards
    return total


def replayed(kernel: Kernel, inputs: Sequence[Inputs], world: World) -> list[Run]:
    """Capture a graph on the first inputs; replay it with the contents of each of the others in the same tensors.

    Raises CannotCapture for a kernel that waits for the device.
    """
    import torch

    stages = _stages(kernel, inputs[0], world)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")  # a wait raises here, where it harms no capture
    try:
        with torch.cuda.stream(stream):
            _launch(stages)  # compiled and tuned before the capture
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            results = _launch(stages)
    except (RuntimeError, AssertionError) as error:
        raise CannotCapture(f"{kernel.name} cannot be captured in a graph: {' '.join(str(error).split())[:200]}") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)
    runs = []
    for each in inputs[1:]:
        for stage, new in zip(stages, _stages(kernel, each, world), strict=True):
            _copy(stage, new)
        graph.replay()
        torch.cuda.synchronize()
        runs.append(_taken(stages, results, each))
    return runs


def _copy(stage: Prepared, new: Prepared) -> None:
    """Put the contents of another call's tensors where a captured graph reads them."""
    for name, tensor in stage.arguments.items():
        source = new.arguments[name]
        if not hasattr(tensor, "copy_"):
            if tensor != source:
                raise M3CheckError(f"a graph cannot be replayed with another {name}: {tensor}, then {source}")
            continue
        if name in ("score", "topk_idx") and not source.numel():
            continue  # handed over by an earlier kernel of the graph
        if tensor.shape != source.shape:
            raise M3CheckError(
                f"a graph cannot be replayed with {name} of shape {list(source.shape)}, not {list(tensor.shape)}"
            )
        _words(tensor).copy_(_words(source))


def _words(tensor: torch.Tensor) -> torch.Tensor:
    from m3check.paging import words

    return words(tensor)


def in_flight(kernel: Kernel, inputs: Inputs, world: World, count: int) -> list[Run]:
    """`count` launches without waiting, alternating between two streams that have buffers of their own."""
    import torch

    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    prepared = [_stages(kernel, inputs, world) for _ in streams]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    kept: list[tuple[int, list[Any]]] = []
    for i in range(count):
        with torch.cuda.stream(streams[i % 2]):
            kept.append((i % 2, [result.clone() for result in _launch(prepared[i % 2])]))
    torch.cuda.synchronize()
    return [_taken(prepared[lane], results, inputs) for lane, results in kept]
