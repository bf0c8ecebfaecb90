"""The process that runs kernels: `python -m m3check.worker FD` loads one provider and answers cases."""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from m3check import arch as arches
from m3check import cases, device, isolate, kernels, runner, sanitize
from m3check.types import RED, M3CheckError, PlanLine


class Service:
    """One worker's state: a Session after `load`."""

    def __init__(self) -> None:
        self.session: runner.Session | None = None
        self.log: sanitize.Log | None = None
        """What compute-sanitizer writes, where this process runs under it."""

    def load(self, command: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Import torch, repair the interpreter where it is used, load the provider; the answer is the worker's hello."""
        try:
            return self._load(command, send)
        except M3CheckError as error:
            return {"refused": str(error)}
        except ModuleNotFoundError as error:
            if error.name in ("torch", "triton", "numpy"):
                return {"refused": f"{error.name} is not installed; m3check run needs it: pip install {error.name}"}
            raise

    def _load(self, command: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        import torch

        torch.set_num_threads(1)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        arch = arches.find_arch(command["arch"])
        evidence, where = command["evidence"], "cpu"
        repairs: list[dict[str, Any]] = []
        unrepaired = []
        if evidence == "device":
            where = f"cuda:{command['device']}"
            device.on_compile(lambda began: send({"compiling": began}))
        elif evidence == "compiled":
            from m3check.compiled import target

            target.present(arch)
        else:
            from m3check import interpret

            for repair in interpret.install():
                repairs.append({"name": repair.name, "needed": repair.needed, "installed": repair.installed})
                if repair.needed and not repair.installed:
                    unrepaired.append(f"the interpreter's {repair.name} could not be repaired: {repair.detail}")
        # Imported now, so that no case's time limit pays for it.
        from m3check import checks, reference  # noqa: F401
        from m3check.cases import generate  # noqa: F401

        if command.get("sanitizer"):
            self.log = sanitize.Log(*command["sanitizer"])
        loaded = kernels.load(kernels.parse_spec(command["spec"]), arch, evidence, command["offline"])
        if evidence == "device" and loaded.on_compile is not None:
            loaded.on_compile(lambda began: send({"compiling": began}))
        self.session = runner.Session(
            arch, evidence, where, loaded, unrepaired, lambda began: send({"compiling": began}), heat=True
        )
        return {
            "description": loaded.description,
            "warnings": list(loaded.warnings),
            "repairs": repairs,
            "environment": environment(where),
        }

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """One case, or many seeds of one; the answer is a Result (or a tally) as JSON-ready data."""
        assert self.session is not None
        if "do" in message:
            from m3check.explain import service

            return service.answer(self.session, message)
        if "seeds" in message:
            from m3check import soak

            return soak.answer(self.session, message)
        line = msgspec.convert(message["line"], PlanLine)
        case = cases.parse_id(line.case)
        result = runner.run_one(case, self.session, line, message["repro"])
        spent = result.status in RED and self.session.evidence == "device" and device.lost(self.session.device)
        if self.log is not None:
            result = sanitize.joined(result, self.log.news())
        return {**msgspec.to_builtins(result), "spent": spent}


def environment(device: str) -> dict[str, Any]:
    """What the numbers of this process depend on."""
    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "machine": f"{platform.system()} {platform.machine()}",
    }
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "cuda": str(torch.version.cuda or torch.version.hip)}
    return facts


def main() -> None:
    """Serve on the inherited socket whose number is the only argument; 0 is stdin, which kernels then find empty."""
    service = Service()
    number = int(sys.argv[1])
    if number == 0:
        number = os.dup(0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with socket.socket(fileno=number) as channel:
        isolate.serve(channel, service.load, service.answer)


if __name__ == "__main__":
    main()
