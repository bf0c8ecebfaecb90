"""A kernel launched out of a captured graph, with other contents in the tensors that it was captured with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from m3check.kernels.contract import Prepared, prepare
from m3check.types import OPS, Inputs, Kernel, M3CheckError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from m3check.paging import Run, World


Answer = TypeVar("Answer")


class CannotCapture(M3CheckError):
    """A kernel that cannot be part of a CUDA graph, for instance because it reads a length on the host."""


def stages(kernel: Kernel, inputs: Inputs, world: World) -> list[Prepared]:
    """The calls of a kernel, or of a chain's kernels in order, ready to launch; `launch` hands results over."""
    import torch

    upstream: dict[str, Tensor] = {}
    ready = []
    for op in OPS[kernel.op].chain or (kernel.op,):
        part = kernel.parts.get(op, kernel)
        ready.append(prepare(part, inputs, world, upstream))
        upstream[OPS[op].outputs[0]] = torch.empty(0)
    return ready


def launch(prepared: Sequence[Prepared]) -> list[Any]:
    """Launch a chain's stages, each on the results of those before it."""
    passed: dict[str, Any] = {}
    results = []
    for stage in prepared:
        stage.arguments |= {name: value for name, value in passed.items() if name in stage.arguments}
        result = stage.launch()
        passed |= {"ids": {"topk_idx": result}, "score": {"score": result}}.get(OPS[stage.kernel.op].outputs[0], {})
        results.append(result)
    return results


def taken(prepared: Sequence[Prepared], results: Sequence[Any], inputs: Inputs) -> Run:
    """The run of a chain's stages with copies of their results in logical form."""
    from m3check.paging import Run

    total = Run({})
    for stage, result in zip(prepared, results, strict=True):
        stage.inputs, stage.run.outputs, stage.run.beyond = inputs, {}, {}
        run = stage.take(result)
        total.outputs |= run.outputs
        total.guards += run.guards
    return total


def captured(launched: Callable[[], Answer], name: str) -> tuple[Any, Answer]:
    """(a CUDA graph of what `launched` launches, what it returned while it was captured).

    It is called once before, on the same kind of stream, so that kernels are compiled and tuned. What it reads and writes
    must lie where it lies as long as the graph is replayed. Raises CannotCapture where it waits for the device.
    """
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")  # a wait raises here, where it harms no capture
    try:
        with torch.cuda.stream(stream):
            launched()
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            returned = launched()
    except (RuntimeError, AssertionError) as error:
        raise CannotCapture(f"{name} cannot be captured in a graph: {' '.join(str(error).split())[:200]}") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return graph, returned


def replayed(kernel: Kernel, inputs: Sequence[Inputs], world: World) -> list[Run]:
    """Capture a graph on the first inputs; replay it with the contents of each of the others in the same tensors.

    A replay is read, and watched, as the call whose contents it was given: what it may write, and where that stands, are
    that call's. Raises CannotCapture for a kernel that waits for the device.
    """
    import torch

    first = stages(kernel, inputs[0], world)
    graph, results = captured(lambda: launch(first), kernel.name)
    runs = []
    for each in inputs[1:]:
        fresh = stages(kernel, each, world)
        for stage, new in zip(first, fresh, strict=True):
            _copy(stage, new)
        graph.replay()
        torch.cuda.synchronize()
        for stage, new in zip(first, fresh, strict=True):
            for name, buffer in new.buffers.items():
                buffer.hold(stage.buffers[name])
        runs.append(taken(fresh, results, each))
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
        if name in stage.buffers:
            stage.buffers[name].hold(new.buffers[name])
        else:
            _words(tensor).copy_(_words(source))


def _words(tensor: torch.Tensor) -> torch.Tensor:
    from m3check.paging import words

    return words(tensor)
