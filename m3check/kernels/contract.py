"""How a kernel is called: the keyword arguments of its op, built from logical inputs, and what must come back.

What differs from one family of ops to another stands in kernels/calls.
Providers that keep these names need no adapter code: a parameter that a function does not take is not passed, and one that
m3check does not know is an error that lists the known ones. `m3check kernels --signatures` prints SIGNATURES.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from m3check.kernels import calls
from m3check.kernels.calls import BrokenContract
from m3check.types import OPS, Inputs, Kernel, M3CheckError

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.kernels.calls.family import Taken
    from m3check.paging import Guard, Observation, Run, Territory, World

SIGNATURES: Mapping[str, tuple[tuple[str, ...], str]] = {
    op: signature for family in calls.FAMILIES.values() for op, signature in family.signatures.items()
}
"""op: (its keywords, what comes back)"""


def check_signature(op: str, function: Callable[..., Any], name: str) -> frozenset[str]:
    """The keywords to pass; raises BrokenContract for a parameter that the op's contract does not have."""
    known = SIGNATURES[op][0]
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return frozenset(known)
    by_place = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if by_place:
        raise BrokenContract(
            f"{name} takes {', '.join(by_place)} by position only, and m3check calls by keyword: take out the /"
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):  # nobody promised to write into a buffer unnamed
        return frozenset(p for p in known if p in parameters or p not in calls.of(op).named_only)
    for parameter in parameters.values():
        optional = parameter.default is not parameter.empty or parameter.kind is parameter.VAR_POSITIONAL
        if parameter.name not in known and not optional:
            raise BrokenContract(
                f"{name} has a parameter {parameter.name!r} that {op} does not provide: give it a default or take it out; "
                f"it may take: {', '.join(known)} (see m3check kernels --signatures {op})"
            )
    missing = [p for p in known if p not in parameters and p not in calls.of(op).optional]
    if missing:
        lacks = f"{name} lacks the parameter{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
        raise BrokenContract(f"{lacks}, without which {op} cannot be right (see m3check kernels --signatures {op})")
    return frozenset(p for p in known if p in parameters)


Observe: TypeAlias = "Callable[[Sequence[Territory]], AbstractContextManager[Observation]]"
"""Watches memory while a kernel runs that may use these tensors only; all is told when the block is left."""


def call(kernel: Kernel, inputs: Inputs, world: World | None = None, observe: Observe | None = None) -> Run:
    """Run one kernel (or, for a chain, its parts in order) on physical tensors made from `inputs`."""
    from m3check.paging import World

    world = world or World()
    if OPS[kernel.op].phase == "mixed":
        from m3check.kernels import indexer

        return indexer.call(kernel, inputs, world, observe)
    if OPS[kernel.op].chain:
        return _call_chain(kernel, inputs, world, observe)
    return _call_one(kernel, inputs, world, {}, observe)


def _call_chain(kernel: Kernel, inputs: Inputs, world: World, observe: Observe | None) -> Run:
    from m3check.paging import Run

    total = Run({})
    upstream: dict[str, Tensor] = {}
    for op in OPS[kernel.op].chain:
        run = _call_one(kernel.parts[op], inputs, world, upstream, observe)
        if run.accesses is not None:
            total.accesses = (total.accesses or []) + run.accesses
        total.outputs |= run.outputs
        total.guards += run.guards
        total.frozen += run.frozen
        total.beyond |= run.beyond
        total.given |= run.given
    return total


@dataclass
class Prepared:
    """A call of one kernel (never a chain) whose physical tensors stand ready; `launch` may be repeated."""

    kernel: Kernel
    inputs: Inputs
    arguments: dict[str, Any]
    buffers: dict[str, Guard]  # what the kernel writes into, the one that holds its result first
    run: Run
    territories: tuple[Territory, ...] = ()
    """What the kernel may do with each tensor."""
    reads: Callable[[Any, Mapping[str, Guard]], Taken] | None = None
    """How its result is read, where not as the family's others."""

    def launch(self) -> Any:
        """Call the kernel; returns its result, in physical form."""
        returned = self.kernel.function(**self.arguments)
        buffer = next(iter(self.buffers.values()), None)
        if returned is None and buffer is None:
            wanted = SIGNATURES[self.kernel.op][1]
            raise BrokenContract(f"{self.kernel.name} returned None and takes no buffer; {self.kernel.op} returns {wanted}")
        return returned if returned is not None else buffer.view  # type: ignore[union-attr]

    def take(self, result: Any) -> Run:
        """The run with a copy of `result` in logical form, and of the scores that a selection was given a buffer for."""
        run, family = self.run, calls.of(self.kernel.op)
        own = self.reads
        taken = own(result, self.buffers) if own else family.take(self.kernel, result, self.inputs, self.buffers)
        run.outputs |= taken.outputs
        run.beyond |= taken.beyond
        run.given |= taken.given
        return run


def _call_one(kernel: Kernel, inputs: Inputs, world: World, upstream: dict[str, Tensor], observe: Observe | None) -> Run:
    prepared = prepare(kernel, inputs, world, upstream)
    if observe is None:
        result = prepared.launch()
    else:
        with observe(prepared.territories) as seen:
            result = prepared.launch()
        prepared.run.accesses = seen.accesses if seen.launches else None
    upstream[OPS[kernel.op].outputs[0]] = result
    return prepared.take(result)


def prepare(kernel: Kernel, inputs: Inputs, world: World, upstream: Mapping[str, Tensor] = {}) -> Prepared:
    """Make the physical tensors of one call; `upstream` holds the results of earlier ops of a chain."""
    from m3check import paging

    family = calls.of(kernel.op)
    accepted = check_signature(kernel.op, kernel.function, kernel.name)
    made = family.physical(kernel, inputs, world, accepted, upstream)
    arguments = made.arguments
    run = paging.Run({})
    watched = [name for name in SIGNATURES[kernel.op][0] if name in accepted and hasattr(arguments.get(name), "as_strided")]
    run.frozen = [paging.Frozen.of(name, arguments[name], made.touched(name, arguments[name])) for name in watched]
    if world.own_buffers:
        accepted -= _without(kernel.function, family.returnable)
    buffers = made.buffers(accepted)
    run.guards = list(buffers.values())
    arguments |= {name: guard.view for name, guard in buffers.items()}

    def lay_out(name: str, tensor: Tensor) -> None:
        arguments[name] = tensor
        if name in buffers:
            buffers[name].view = tensor

    present = {name for name in accepted if arguments.get(name) is not None}
    if world.far_rows:
        for name, dim in family.token_dimension.items():
            if name in present and arguments[name].numel():
                lay_out(name, paging.with_far_rows(arguments[name], dim))
    if world.apart:
        for name in family.channelled & present:
            lay_out(name, paging.apart(arguments[name]))
    if world.odd_strides:
        tensors = {name: value for name, value in arguments.items() if hasattr(value, "as_strided")}
        arguments |= {name: paging.oddly_strided(value) for name, value in tensors.items()}
    arguments = {name: arguments[name] for name in accepted if name in arguments}
    territories = tuple(
        paging.Territory(
            name, tensor, made.readable(name, tensor), name in buffers, name in family.fresh, name in family.held
        )
        for name, tensor in arguments.items()
        if hasattr(tensor, "as_strided")
    )
    return Prepared(kernel, inputs, arguments, buffers, run, territories, made.take)


def _without(function: Callable[..., Any], returnable: frozenset[str]) -> frozenset[str]:
    """The buffers that a kernel makes itself where none is given; raises M3CheckError where it needs all of them."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    own = frozenset(n for n in returnable if n in parameters and parameters[n].default is None)
    if not own:
        raise M3CheckError(f"{function} has no buffer that it can do without")
    return own
