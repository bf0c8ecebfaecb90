"""Where the flags of a run come from: defaults, a settings file, the environment, the command line; the later wins.

The file is `m3check.toml`, or the table `[tool.m3check]` of `pyproject.toml`, in the working directory and nowhere else:
what a gate does must be seen in the folder that it runs in. Its keys are the flags' words, with the floors in `[floors]`.
The environment has `M3CHECK_TIER=ci` and the like, each holding what stands behind its flag. What chooses a part of a run,
or is said once (`-k`, `--case`, `--shard`, `--resume`), has no setting: left behind in a file it would shrink a gate.
"""

from __future__ import annotations

import os
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from m3check import floors
from m3check.config import RunOptions, choose
from m3check.types import M3CheckError

Kind = Literal["word", "words", "whole", "seconds", "switch", "file", "floors"]

SETTINGS: Mapping[str, tuple[str, Kind]] = {  # the word in files and flags: field of RunOptions, kind of value
    "arch": ("arch", "word"),
    "kernels": ("kernels", "words"),
    "op": ("ops", "words"),
    "tier": ("tier", "word"),
    "jobs": ("jobs", "whole"),
    "seed": ("seed", "whole"),
    "timeout": ("timeout", "seconds"),
    "require": ("require", "word"),
    "strict": ("strict", "switch"),
    "offline": ("offline", "switch"),
    "ledger": ("ledger", "file"),
    "out": ("out", "file"),
    "floor": ("floors", "floors"),
}
ONCE = ("k", "case", "shard", "resume", "sanitize", "save-failures")
TABLE = "floors"
"""The file's word for `floor`, because there it is a table."""

FILE = "m3check.toml"
PREFIX = "M3CHECK_"
OTHERS = ("M3CHECK_CACHE",)
"""Variables that are no flags."""

YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
WANTED: Mapping[Kind, str] = {
    "word": 'a text, as in "ci"',
    "words": 'a list of texts, as in ["triton", "vllm==0.33.0"]',
    "whole": "a whole number",
    "seconds": "a number of seconds",
    "switch": "true or false",
    "file": "a path",
    "floors": "a table [floors]",
}


@dataclass(frozen=True)
class Value:
    """What one setting is worth, and who said so: `default`, a file, or a variable of the environment."""

    value: Any
    origin: str


def load(arch: str | None = None, folder: Path | None = None, environ: Mapping[str, str] | None = None) -> dict[str, Value]:
    """Every setting below the command line, by its word. Raises M3CheckError for a key or a value that cannot be meant.

    `arch` is the target that the command line names: `[floors.ARCH]` depends on it.
    """
    environ = os.environ if environ is None else environ
    found = {word: Value(_default(name), "default") for word, (name, _) in SETTINGS.items()}
    table, file = read(folder or Path())
    said = _from_environment(environ)
    for word, value in table.items():
        if word != TABLE:
            found[word] = Value(_typed(word, value, file), file)
    if "arch" in said:
        found["arch"] = said["arch"]
    if TABLE in table:
        own = _floors(table[TABLE], arch or found["arch"].value or "", file)
        found["floor"] = Value(written(own), file)
    for word, each in said.items():
        found[word] = Value(stacked(found[word].value, each.value), each.origin) if word == "floor" else each
    return found


def stacked(below: tuple[str, ...], above: tuple[str, ...]) -> tuple[str, ...]:
    """Floors of two layers: key by key the upper one wins, and its `none` forgets the lower one."""
    upper = floors.parse(above)
    return written(upper if floors.NONE in upper else floors.parse(below) | upper)


def written(found: Mapping[str, str]) -> tuple[str, ...]:
    """Floors as words again."""
    return tuple(f"{key}={value}" if value else key for key, value in found.items())


def read(folder: Path) -> tuple[dict[str, Any], str]:
    """The settings of a folder and the file's name; ({}, "") where it has none. Raises M3CheckError for a broken file."""
    own, project = _toml(folder / FILE), _toml(folder / "pyproject.toml")
    tools = (project or {}).get("tool", {})
    shared = tools.get("m3check") if isinstance(tools, dict) else None
    if own is not None and shared is not None:
        raise M3CheckError(f"settings stand in {FILE} and in [tool.m3check] of pyproject.toml; keep one of them")
    if own is None and shared is None:
        return {}, ""
    table, file = (own, FILE) if own is not None else (shared, "pyproject.toml")
    if not isinstance(table, dict):
        raise M3CheckError(f"{file}: tool.m3check is not a table; write [tool.m3check]")
    for key in table:
        if key in ONCE:
            raise M3CheckError(f"{file}: {key} cannot be set in a file; say it on the command line")
        try:
            choose("key", key, [TABLE if word == "floor" else word for word in SETTINGS])
        except M3CheckError as error:
            raise M3CheckError(f"{file}: {error}") from None
    return table, file


def _default(name: str) -> Any:
    default = next(field.default for field in fields(RunOptions) if field.name == name)
    return None if default is MISSING else default  # arch has none


def _toml(path: Path) -> dict[str, Any] | None:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise M3CheckError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise M3CheckError(f"{path} is not TOML: {error}") from None


def _floors(table: Any, arch: str, file: str) -> dict[str, str]:
    if not isinstance(table, dict):
        raise M3CheckError(f"{file}: floors = {table!r}: wanted {WANTED['floors']}")
    try:
        return floors.from_table(table, arch)
    except M3CheckError as error:
        raise M3CheckError(f"{file}: {error}") from None


def _typed(word: str, value: Any, file: str) -> Any:
    """A value out of a file as RunOptions has it."""
    kind = SETTINGS[word][1]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in ("word", "file") and isinstance(value, str) and value:
        return Path(value) if kind == "file" else value
    if kind == "words" and isinstance(value, (str, list)):
        values = [value] if isinstance(value, str) else value
        if values and all(isinstance(each, str) and each for each in values):
            return tuple(dict.fromkeys(values))
    if (kind == "whole" and number and isinstance(value, int)) or (kind == "switch" and isinstance(value, bool)):
        return value
    if kind == "seconds" and number:
        return float(value)
    raise M3CheckError(f"{file}: {word} = {value!r}: wanted {WANTED[kind]}")


def _from_environment(environ: Mapping[str, str]) -> dict[str, Value]:
    """Settings of M3CHECK_* variables; an empty one says nothing."""
    found = {}
    names = {PREFIX + word.upper(): word for word in SETTINGS}
    for name, text in environ.items():
        if not name.startswith(PREFIX) or name in OTHERS:
            continue
        if name.removeprefix(PREFIX).lower().replace("_", "-") in ONCE:
            raise M3CheckError(f"{name} cannot be set in the environment; say it on the command line")
        choose("variable", name, (*names, *OTHERS))
        if text.strip():
            found[names[name]] = Value(_parsed(names[name], text.strip(), name), name)
    return found


def _parsed(word: str, text: str, origin: str) -> Any:
    """The text of a variable as RunOptions has it: what stands behind the flag."""
    kind = SETTINGS[word][1]
    try:
        if kind in ("words", "floors"):
            values = tuple(dict.fromkeys(shlex.split(text)))
            return written(floors.parse(values)) if kind == "floors" else values
        if kind == "switch":
            return {**dict.fromkeys(YES, True), **dict.fromkeys(NO, False)}[text.lower()]
        return {"word": str, "file": Path, "whole": int, "seconds": float}[kind](text)
    except (KeyError, ValueError):
        wanted = "1 or 0" if kind == "switch" else WANTED[kind]
        raise M3CheckError(f"{origin}={text!r}: wanted {wanted}") from None
    except M3CheckError as error:
        raise M3CheckError(f"{origin}: {error}") from None
