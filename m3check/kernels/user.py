"""A user's kernels: a Python file or module with functions named like the ops."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import get_args

from m3check.arch import Arch
from m3check.kernels import named
from m3check.kernels.contract import SIGNATURES, check_signature
from m3check.kernels.provider import Loaded, Spec, with_chains
from m3check.kernels.serving import Layout
from m3check.types import Case, Evidence, Kernel, M3CheckError, Profile

ALIAS = "minimax_m3_"
"""vLLM's prefix of the same names, accepted as well."""


def prepare(spec: Spec, offline: bool) -> tuple[str, ...]:
    """See that the file or module is there, without running it."""
    if spec.path and Path(spec.path).is_dir():
        raise M3CheckError(
            f"{spec.path} is a folder; wanted a Python file, such as {os.path.join(spec.text, 'kernels.py')}"
        )
    if spec.path and not Path(spec.path).is_file():
        raise M3CheckError(f"there is no kernel file {spec.path}")
    if spec.module:
        _importable_from_here()
        top = spec.module.partition(".")[0]
        if importlib.util.find_spec(top) is None:
            raise M3CheckError(f"there is no module {spec.module}: {top} is neither here ({os.getcwd()}) nor installed")
    return ()


def load(spec: Spec, arch: Arch, evidence: Evidence, offline: bool) -> Loaded:
    """Import the file or module and take its functions that are named like ops."""
    prepare(spec, offline)
    module = _import(spec)
    profile = getattr(module, "PROFILE", None)
    if profile is not None and not isinstance(profile, Profile):
        raise M3CheckError(f"{spec.text}: PROFILE is {type(profile).__name__}, wanted m3check.Profile(...)")
    kernels: dict[str, Kernel] = {}
    for op in SIGNATURES:
        name = next((n for n in (op, ALIAS + op, *named.of(op)) if hasattr(module, n)), None)
        if name is None:
            continue
        function = getattr(module, name)
        if not callable(function):
            raise M3CheckError(f"{spec.text}: {name} is {type(function).__name__}, wanted a function")
        published = named.of(op).get(name)
        if published is not None:
            function = published.adapted(function)
        check_signature(op, function, f"{spec.text}: {name}")
        promises = profile or (published.profile if published else Profile())
        warm_up = getattr(module, f"warm_up_{op}", published.warm_up_of(module) if published else None)
        kernels[op] = Kernel(spec.text, op, name, promises, function, warm_up=warm_up)
    missing = {op: f"{spec.text} defines no {op}{_meant(op, module)}" for op in SIGNATURES if op not in kernels}
    layer = _layer(spec, module, profile or Profile())
    if not kernels and not layer:
        near = "".join(sentence for op in SIGNATURES if (sentence := _meant(op, module)))
        wanted = f"{', '.join(SIGNATURES)}, or a layer named indexer"
        raise M3CheckError(f"{spec.text} defines no kernel{near}; wanted functions named {wanted}")
    all_kernels, all_missing = with_chains(kernels, missing)
    all_kernels |= layer
    all_missing = {op: sentence for op, sentence in all_missing.items() if op not in layer}
    return Loaded(spec, all_kernels, all_missing, {"from": getattr(module, "__file__", None) or spec.text, **_hash(module)})


def _layer(spec: Spec, module: ModuleType, profile: Profile) -> dict[str, Kernel]:
    """A whole layer of the file's own, host code included, in the place of ours around its kernels: `indexer`, a Maker."""
    maker = getattr(module, "indexer", None)
    if maker is None or isinstance(maker, ModuleType):
        return {}
    layout = getattr(maker, "layout", None)
    if not callable(maker) or layout not in get_args(Layout):
        raise M3CheckError(
            f"{spec.text}: indexer is to be called with (figures, buffers) and to have a layout, 'head' or 'token', of its "
            f"id buffer (m3check.kernels.serving.Maker); got {type(maker).__name__} with layout {layout!r}"
        )
    return {"indexer": Kernel(spec.text, "indexer", "indexer", profile, maker)}


def _meant(op: str, module: ModuleType) -> str:
    """A clause where a function of the file is named almost like an op, so that a slip of the pen is no silent skip."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    near = difflib.get_close_matches(op, [name for name in own if name not in SIGNATURES], n=1, cutoff=0.9)
    return f" (did you mean {op} by {near[0]}?)" if near else ""


def _hash(module: ModuleType) -> dict[str, str]:
    """What tells two versions of a kernel file apart, for a resumed run and for a merge."""
    path = Path(getattr(module, "__file__", None) or "")
    return {f"sha256 {path.name}": hashlib.sha256(path.read_bytes()).hexdigest()} if path.is_file() else {}


def refuses(spec: Spec, case: Case, arch: Arch, evidence: Evidence) -> str | None:
    """Nothing is known of a user's kernels before they are loaded."""
    return None


def compiles(spec: Spec) -> bool:
    """Whether it may launch Triton kernels: not where a file imports but torch, m3check and the standard library."""
    try:
        tree = ast.parse(Path(spec.path).read_bytes()) if spec.path else None
    except (OSError, SyntaxError, ValueError):
        return True
    if tree is None:
        return True
    plain = {"torch", "numpy", "m3check", *sys.stdlib_module_names}
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(name.partition(".")[0] not in plain for name in names):
            return True
    return False


def _import(spec: Spec) -> ModuleType:
    try:
        if spec.module:
            return importlib.import_module(spec.module)
        return _import_file(Path(spec.path))
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{spec.module}.".startswith(f"{error.name}."):
            raise M3CheckError(f"there is no module {spec.module}: {error}") from error
        raise M3CheckError(
            f"{spec.text} does not import: {_where(error)}{type(error).__name__}: {_message(error)}"
        ) from error


def _import_file(path: Path) -> ModuleType:
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # its neighbours, as if it had been run
    found = importlib.util.spec_from_file_location(f"m3check_user_{path.stem}", path)
    if found is None or found.loader is None:
        raise M3CheckError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses and Triton look a function's module up
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[found.name]
        raise
    return module


def _importable_from_here() -> None:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def _where(error: BaseException) -> str:
    """File and line of the deepest frame outside m3check and the import machinery, which is where to look first."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: "
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    here = Path(__file__).parents[1]
    own = [f for f in frames if here not in Path(f.filename).parents and "importlib" not in Path(f.filename).parts]
    return f"{own[-1].filename}:{own[-1].lineno}: " if own else ""


def _message(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    if isinstance(error, TypeError) and "Profile.__init__" in text:
        text += f"; known: {', '.join(field.name for field in fields(Profile))} (see m3check kernels --profile)"
    return text
