"""`m3check run --save-failures N`: the first red cases of a run once more, each saved as a folder that replays."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from m3check.config import RunOptions
from m3check.types import RED, M3CheckError, Record

FOLDER = "failures"


def check() -> None:
    """Raise M3CheckError where bundles cannot be written, before anything has run."""
    if importlib.util.find_spec("safetensors") is None:
        raise M3CheckError("--save-failures needs safetensors, which is not installed: pip install safetensors")


def save(record: Record, options: RunOptions, told: Callable[[str], None]) -> list[Path]:
    """The folders of up to `options.save_failures` red cases; what cannot be saved is told and passed over."""
    import msgspec

    from m3check import isolate
    from m3check.explain.process import Helper

    red = [r for r in record.results if r.status in RED and r.evidence != "compiled"][: options.save_failures]
    saved: list[Path] = []
    for provider in dict.fromkeys(result.provider for result in red):
        try:
            with Helper(options.arch, provider, options.offline, options.timeout, told) as helper:
                for result in (r for r in red if r.provider == provider):
                    line = helper.line(result.case)
                    question = {
                        "do": "save",
                        "line": msgspec.to_builtins(line),
                        "folder": str((options.folder / FOLDER).resolve()),
                        "description": record.environment.get("providers", {}).get(provider, {}),
                    }
                    answer = helper.ask(question)
                    if isinstance(answer, isolate.Death):
                        told(f"m3check: {result.case} was not saved: {answer.kind}: {answer.reason}")
                    else:
                        saved.append(Path(answer["saved"]))
        except M3CheckError as error:
            told(f"m3check: not saved: {error}")
    return saved
