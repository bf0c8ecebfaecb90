"""A failing call as a folder that can be replayed without m3check: tensors as safetensors, case.json, repro.py.

The tensors are the storages that the kernel was given, poison and margins included, with the shape and strides of each
argument beside them; what a kernel gave, what the reference wants and how far apart they may be stand with them. Provider
sources are not copied: the kernel is named by version, module, file and hash. No pickle.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3check.types import OPS, SPARSE, Case, Inputs, Kernel, M3CheckError, Outputs, PlanLine, Status

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.explain.stages import Trouble
    from m3check.runner import Rule, Session

LARGEST = 4 << 30
"""Bytes that a bundle may take."""

FORMAT = "m3check-bundle 1"


def save(case: Case, session: Session, line: PlanLine, folder: Path, description: Mapping[str, Any]) -> Path:
    """Write the bundle of a case under `folder`; returns its own folder. Raises M3CheckError where it cannot be made."""
    from m3check import runner
    from m3check.explain import trouble_of
    from m3check.explain.stages import Trouble
    from m3check.paging import Run, World

    kernel = session.loaded.kernel(case.op, case)
    assert kernel is not None
    if OPS[case.op].phase == "mixed" and not kernel.parts:
        raise M3CheckError(f"{kernel.name} is a layer, host code that no folder holds; only calls of kernels are saved")
    inputs = runner.inputs_for(kernel, case, session.device)
    raised = ""
    try:
        trouble = trouble_of(kernel, inputs, session, line.invariants)
    except runner.KernelRaised as error:
        trouble, raised = None, str(error)
    if trouble is None or trouble.world.far or trouble.world.far_rows:
        setting = runner.setting_of(kernel, session)
        trouble = Trouble(inputs, Run({}), World(), kernel, setting, trouble.findings if trouble else [])
    name = f"{case.op}-{hashlib.sha256(f'{line.case} {line.provider}'.encode()).hexdigest()[:12]}"
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    tensors, calls = _calls(trouble, session)
    metadata = {
        "format": FORMAT,
        "case": line.case,
        "provider": line.provider,
        "arch": session.arch.name,
        "evidence": session.evidence,
        "findings": [
            {"check": f.check, "measured": str(f.measured), "limit": str(f.limit), "where": f.where, "hint": f.hint}
            for f in trouble.findings
            if f.status is Status.FAILED
        ],
        "changed": trouble.how,
        "raised": raised,
        "provider_description": dict(description),
        "versions": _versions(),
        "calls": calls,
    }
    _write_tensors(target / "tensors.safetensors", tensors)
    (target / "case.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    script = Path(__file__).parent / "data" / "repro.py.txt"
    (target / "repro.py").write_text(script.read_text(encoding="utf-8"), encoding="utf-8")
    return target


def _calls(trouble: Trouble, session: Session) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The tensors by name, and each kernel's call in order: one, or those of a chain on what the kernels before gave."""
    from m3check import runner
    from m3check.kernels import contract

    kernel, inputs = trouble.kernel, trouble.inputs
    tensors: dict[str, Tensor] = {}
    calls: list[dict[str, Any]] = []
    upstream: dict[str, Tensor] = {}
    for op in OPS[kernel.op].chain or (kernel.op,):
        part = kernel.parts.get(op, kernel)
        prepared = contract.prepare(part, inputs, trouble.world, upstream)
        arguments = {name: _argument(tensors, f"{op}/{name}", value) for name, value in prepared.arguments.items()}
        call: dict[str, Any] = {"op": op, "kernel": _named(part), "arguments": arguments, "output": OPS[op].outputs[0]}
        call["buffer"] = next(iter(prepared.buffers), "")
        calls.append(call)
        try:
            result = runner.guarded(part, prepared.launch)
            run = prepared.take(result)
        except (runner.KernelRaised, M3CheckError) as error:
            call["raised"] = str(error)
            break
        upstream[OPS[op].outputs[0]] = result
        given = run.outputs[OPS[op].outputs[0]]
        wanted, limit = _judgement(inputs, op, run.outputs, upstream, trouble)
        for name, tensor in (("given", given), ("wanted", wanted), ("limit", limit)):
            if tensor is not None:
                call[name] = _argument(tensors, f"{op}/{name}", tensor.contiguous())
    return tensors, calls


def _judgement(
    inputs: Inputs, op: str, outputs: Outputs, upstream: Mapping[str, Tensor], trouble: Trouble
) -> tuple[Tensor, Tensor | None]:
    """(what one kernel should have given on what it read, by how much each number may differ)."""
    from m3check import reference
    from m3check.checks import charts
    from m3check.checks.view import View
    from m3check.paging import Run

    name = OPS[op].outputs[0]
    rule: Rule = "folded" if trouble.kernel.profile.dequantise == "folded" else "rounded"
    lists = inputs.topk_idx if inputs.topk_idx is not None else upstream.get("ids")
    scores = inputs.scores if inputs.scores is not None else upstream.get("score")
    if scores is not None:
        scores = scores[..., : inputs.case.block_columns]
    mine = replace(inputs, case=replace(inputs.case, op=op), topk_idx=lists, scores=scores)
    if op in SPARSE and not op.startswith("sparse_attn"):
        mine = replace(mine, q=None, k=None, v=None, k_scale=None, v_scale=None, topk_idx=None)
    problem = reference.dequantised(mine, rule)
    expected = reference.expected(problem)
    view = View(OPS[op], problem, Run({name: outputs[name]}), expected, trouble.setting)
    return expected[name], charts.limits(view).get(name)


def _argument(tensors: dict[str, Tensor], name: str, value: Any) -> Any:
    """An argument as JSON: a figure, or a tensor by the name of its storage with shape, strides and offset."""
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    storage = torch.tensor([], dtype=value.dtype, device=value.device).set_(value.untyped_storage())
    if sum(t.numel() * t.element_size() for t in tensors.values()) + storage.numel() * storage.element_size() > LARGEST:
        raise M3CheckError(f"the bundle would take more than {LARGEST >> 30} GiB")
    if storage.element_size() == 1 and storage.is_floating_point():
        storage = storage.view(torch.uint8)  # safetensors does not know every fp8 dialect
    tensors[name] = storage.detach().cpu().contiguous().clone()
    return {
        "tensor": name,
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
        "strides": list(value.stride()),
        "offset": value.storage_offset(),
    }


def _named(kernel: Kernel) -> dict[str, Any]:
    """Where a kernel's function is: module, name, file and the hash of the file; extra parameters that it wants as None."""
    function: Any = kernel.function
    while hasattr(function, "__wrapped__") or hasattr(function, "func"):
        function = getattr(function, "__wrapped__", None) or function.func
    try:
        file = Path(inspect.getsourcefile(function) or "")
    except TypeError:
        file = Path()
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
    module = str(getattr(function, "__module__", ""))
    return {
        "module": "" if module.startswith("m3check_user") else module,  # a file's own name is none that can be imported
        "function": str(getattr(function, "__name__", kernel.name)),
        "file": str(file) if digest else "",
        "sha256": digest,
    }


def _versions() -> dict[str, str]:
    import torch
    import triton

    from m3check import __version__

    return {"m3check": __version__, "torch": torch.__version__, "triton": triton.__version__}


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise M3CheckError("safetensors is not installed and bundles need it: pip install safetensors") from None
    save_file(tensors, path, {"format": FORMAT})
