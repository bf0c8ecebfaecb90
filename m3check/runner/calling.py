"""One call of a kernel in filled memory: what it returned, how it summed, or the sentence of what it raised."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from m3check import cases
from m3check.arch import Arch, Arithmetic
from m3check.runner.memory import filled_memory, fresh_garbage
from m3check.types import DTYPES, OPS, Case, Evidence, Inputs, Kernel, M3CheckError

if TYPE_CHECKING:
    from m3check import checks
    from m3check.device import Launches
    from m3check.kernels.contract import Observe
    from m3check.paging import Run, World

Answer = TypeVar("Answer")


@dataclass
class Session:
    """What one worker holds for life: a provider's kernels on one target by one kind of evidence."""

    arch: Arch
    evidence: Evidence
    device: str
    loaded: Any  # kernels.Loaded
    unrepaired: Sequence[str] = ()
    """Why results of this process cannot be trusted, e.g. an interpreter repair that could not be installed."""
    compiling: Callable[[bool], None] = lambda began: None
    """Hears when cross-compilation begins and ends, which stops the clock of a case."""
    judged_on: str = ""
    """The device of references and checks, which then are no invariants; empty: where the kernel ran."""
    heat: bool = False
    """Whether a result whose comparisons are red says cell by cell where, for the report."""


class KernelRaised(Exception):
    """A kernel raised instead of answering."""

    run: Run | None = None
    """What a layer had done until then."""


def inputs_for(kernel: Kernel, case: Case, device: str) -> Inputs:
    """A case's inputs; attention queries that a kernel rounds first are rounded before anybody sees them."""
    inputs = cases.make_inputs(case, device)
    if not kernel.profile.queries or inputs.q is None:
        return inputs
    import torch

    return replace(inputs, q=inputs.q.to(getattr(torch, DTYPES[kernel.profile.queries])).to(inputs.q.dtype))


def setting_of(kernel: Kernel, session: Session) -> checks.Setting:
    """How a kernel is judged as long as nothing is known of how it summed."""
    from m3check import checks

    return checks.Setting(profile=kernel.profile, arch=session.arch, evidence=session.evidence)


def first_call(kernel: Kernel, inputs: Inputs, session: Session) -> tuple[Run, checks.Setting]:
    """A call in a world of NaN poison, and how it is to be judged; cells read unwritten are weighed by a second call."""
    from m3check.checks import accesses
    from m3check.checks.view import View
    from m3check.paging import World

    run = call(kernel, inputs, session)
    setting = summed(setting_of(kernel, session), run)
    if any(access.misuse == "unwritten" for access in run.accesses or ()):
        again = call(kernel, inputs, session, World(poison="garbage"))
        accesses.weigh(View(OPS[inputs.case.op], inputs, run, {}, setting), again)
    return run, setting


def summed(setting: checks.Setting, run: Run) -> checks.Setting:
    """The setting with the arithmetic of a call, where that is known."""
    if run.arithmetic is None:
        return setting
    return replace(setting, scoring=run.arithmetic.score, dot=run.arithmetic.dot, pv=run.arithmetic.pv)


def call(kernel: Kernel, inputs: Inputs, session: Session, world: World | None = None) -> Run:
    """Run the kernel in filled memory; whatever it raises becomes KernelRaised with the place."""
    from m3check import device
    from m3check.kernels import contract

    def run() -> Run:
        if session.evidence != "device":
            result = contract.call(kernel, inputs, world, _observe())
            result.arithmetic = Arithmetic()
            return result
        with device.recording() as launches:
            result = contract.call(launches.following(kernel), inputs, world)
        import torch

        torch.cuda.synchronize(session.device)
        result.arithmetic = _arithmetic(kernel, inputs.case, launches, session.arch)
        return result

    if world is not None and world.poison == "garbage":
        with fresh_garbage():
            return guarded(kernel, run)
    return guarded(kernel, run)


def _observe() -> Observe:
    """What watches the memory of an interpreted call."""
    from m3check.interpret import addresses

    return addresses.observed


def guarded(kernel: Kernel, run: Callable[[], Answer]) -> Answer:
    """`run()` in filled memory; whatever a kernel raises in it becomes KernelRaised with the place."""
    try:
        with filled_memory():
            return run()
    except M3CheckError:
        raise
    except (Exception, SystemExit) as error:
        raised = KernelRaised(f"{kernel.name} raised {sentence(error)}")
        raised.run = getattr(error, "run", None)
        raise raised from error


def sentence(error: BaseException) -> str:
    """An exception in one sentence, with the innermost source line that is not inside a library."""
    chain = error
    while chain.__cause__ is not None:
        chain = chain.__cause__
    text = " ".join(str(chain).split())
    frames = [f for e in (error, chain) for f in traceback.extract_tb(e.__traceback__)]
    own = [f for f in frames if "site-packages/t" not in f.filename and "contract.py" not in f.filename]
    place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    return f"{type(chain).__name__}: {text[:400]}{place}"


def _arithmetic(kernel: Kernel, case: Case, launches: Launches, arch: Arch) -> Arithmetic:
    """How a call summed on a device: by the matrix instructions in the variants that ran, each op of a chain by its own."""
    chain = OPS[case.op].chain or (case.op,)
    queries = case.index_cache_dtype if OPS[case.op].chain and case.index_cache_dtype.startswith("fp8") else case.dtype
    attended = launches.accumulator(chain[-1], arch, arch.kind(kernel.profile.queries or case.dtype))
    return Arithmetic(launches.accumulator(chain[0], arch, arch.kind(queries)), attended, attended)
