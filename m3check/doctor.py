"""What this machine has, what is missing, and what to do about it. Works without torch and without triton."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

PROBE_LIMIT = 180.0
"""Seconds for a question that needs another process: importing torch on a cold disk takes a minute."""

State = Literal["ok", "missing", "broken", "info"]


@dataclass(frozen=True)
class Line:
    """One thing that was looked at."""

    what: str
    state: State
    found: str
    advice: str = ""
    """What to do; empty where nothing is wrong."""


def examine() -> Iterator[Line]:
    """Every line, as it is found."""
    for look in (_python, _m3check, _libraries, _torch, _gpus, _interpreter, _providers, _cache):
        yield from look()


def _python() -> Iterator[Line]:
    version = platform.python_version()
    fits = sys.version_info >= (3, 11)
    yield Line(
        "python", "ok" if fits else "broken", f"{version} ({sys.executable})", "" if fits else "install Python 3.11 to 3.14"
    )
    linux = sys.platform == "linux"
    advice = "" if linux else "run kernels on Linux; references, list, show and compare work here"
    yield Line(
        "system", "ok" if linux else "info", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores", advice
    )


def _m3check() -> Iterator[Line]:
    from m3check import __version__

    yield Line("m3check", "ok", __version__)


def _libraries() -> Iterator[Line]:
    wanted = {
        "torch": "pip install 'torch>=2.9'; for a machine without a GPU add --index-url https://download.pytorch.org/whl/cpu",
        "triton": "pip install 'triton>=3.6' (Linux only)",
        "numpy": "pip install numpy",
        "msgspec": "pip install msgspec",
        "tabulate": "pip install tabulate",
        "platformdirs": "pip install platformdirs",
        "remotezip": "pip install remotezip; only vllm==X.Y.Z needs it",
    }
    for name, advice in wanted.items():
        version = _version(name)
        yield Line(name, "ok" if version else "missing", version or "not installed", "" if version else advice)


def _torch() -> Iterator[Line]:
    """Whether torch imports, and which GPU it can reach; asked in another process, which may die of it."""
    if not _version("torch"):
        return
    code = (
        "import json, torch; a = torch.cuda.is_available(); "
        "print(json.dumps([torch.version.cuda or torch.version.hip or 'CPU', torch.cuda.get_device_name() if a else '']))"
    )
    answer, trouble = _ask(code)
    if trouble:
        yield Line("torch imports", "broken", trouble, "reinstall torch for this machine")
        return
    build, gpu = json.loads(answer)
    yield Line(
        "torch build",
        "ok",
        build if build == "CPU" else f"for {build}" + (f", reaches {gpu}" if gpu else ", reaches no GPU"),
    )


def _gpus() -> Iterator[Line]:
    from m3check.arch import ARCHS, present

    found = present()
    if not found:
        yield Line("GPU", "info", "none", "every arch can be checked by interpretation; device results need the hardware")
    for index, name in found:
        known = name in ARCHS
        advice = "" if known else f"m3check knows {', '.join(ARCHS)}; this GPU will not be used"
        yield Line(f"GPU {index}", "ok" if known else "info", name, advice)


def _interpreter() -> Iterator[Line]:
    """Which defects of Triton's interpreter this version has, and whether they were repaired."""
    if not (_version("torch") and _version("triton")):
        yield Line("interpreter", "missing", "needs torch and triton", "see above")
        return
    code = (
        "import json; from m3check.interpret import install; "
        "print(json.dumps([[r.name, r.needed, r.installed, r.detail] for r in install()]))"
    )
    answer, trouble = _ask(code, TRITON_INTERPRET="1")
    if trouble:
        yield Line("interpreter", "broken", trouble, "interpreted results cannot be made; install a Triton from 3.6 to 3.9")
        return
    for name, needed, installed, detail in json.loads(answer):
        if not needed:
            yield Line(f"interpreter: {name}", "ok", "sound in this Triton")
        elif installed:
            yield Line(f"interpreter: {name}", "ok", f"repaired: {detail}" if detail else "repaired")
        else:
            advice = "interpreted results are inconclusive; install a Triton from 3.6 to 3.9"
            yield Line(f"interpreter: {name}", "broken", f"not repaired: {detail}", advice)


def _providers() -> Iterator[Line]:
    from m3check.kernels import PROVIDERS, absent

    for provider in PROVIDERS:
        forms = ", ".join(provider.grammar)
        if not provider.distribution and provider.name in provider.grammar:  # part of another package, or of one of several
            if sentence := absent(provider):
                yield Line(
                    f"provider {provider.name}", "info", f"not installed; {forms}", f"{sentence}; needs {provider.needs}"
                )
            else:
                yield Line(f"provider {provider.name}", "ok", f"installed; {forms}")
        elif not provider.distribution:
            yield Line(f"provider {provider.name}", "ok", f"{forms} (needs {provider.needs})")
        elif version := _version(provider.distribution):
            yield Line(f"provider {provider.name}", "ok", f"installed: {version}; {forms}")
        else:
            advice = f"needs {provider.needs}"
            yield Line(f"provider {provider.name}", "info", f"not installed; {forms}", advice)


def _cache() -> Iterator[Line]:
    folder = _cache_folder()
    if folder is None:
        yield Line("cache", "missing", "unknown without platformdirs", "pip install platformdirs, or set M3CHECK_CACHE")
        return
    place = os.path.abspath(folder)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    fits = os.access(place, os.W_OK)
    size = sum(os.path.getsize(os.path.join(top, f)) for top, _, files in os.walk(folder) for f in files)
    advice = "" if fits else "set M3CHECK_CACHE to a folder that you may write"
    yield Line("cache", "ok" if fits else "broken", f"{folder} ({size // 1024} KB)", advice)


def _cache_folder() -> str | None:
    try:
        from m3check.kernels.wheels import cache_folder

        return str(cache_folder())
    except ImportError:
        return os.environ.get("M3CHECK_CACHE")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _ask(code: str, **environment: str) -> tuple[str, str]:
    """(last line of what `python -c code` printed, "") or ("", what went wrong)."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=PROBE_LIMIT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", f"no answer within {PROBE_LIMIT:g} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = lines[-1] if lines else f"exit code {done.returncode}"
    return (last, "") if done.returncode == 0 else ("", last)
