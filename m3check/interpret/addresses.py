"""Every address that an interpreted kernel reads or writes, against the memory that it may use.

Memory is known by region, one for each storage: of the call's tensors, of those that the wrapper allocates meanwhile, and
of whatever else it hands to a launch. A region has a byte of flags for each element, so that judging a tile is one gather.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter as base

from m3check.interpret import launch, memory
from m3check.interpret.allocations import Allocations, source_line
from m3check.interpret.regions import OWN, READ, WRITE, WRITTEN, Region, elements
from m3check.paging import Access, Misuse, Observation, Territory

NEEDS = {"load": READ | WRITTEN, "store": WRITE, "atomic": READ | WRITE | WRITTEN}


@contextmanager
def observed(territories: Sequence[Territory]) -> Iterator[Observation]:
    """Watch a call that may use these tensors and what it allocates; all is told when the block is left."""
    watch = Watch(territories)
    seen = Observation()
    memory.watch(watch.access, watch.launch)
    launch.waits.append(watch.waited)
    try:
        with Allocations(watch):
            yield seen
    finally:
        memory.unwatch(watch.access)
        launch.waits.remove(watch.waited)
        seen.launches = watch.launches
        seen.accesses += watch.found.values()


class Watch:
    """What is known of memory during one call, and what was misused."""

    def __init__(self, territories: Sequence[Territory]) -> None:
        self.found: dict[tuple[Any, ...], Access] = {}
        self._regions: dict[int, Region] = {}
        self._bases: list[int] = []
        self._ordered: list[Region] = []
        self.launches = 0
        self._atomics = False
        self._kernel = ""
        self._dependent = False  # whether this launch may begin before the one before it has ended
        self._waiting = 0  # the last program of it that has waited
        for territory in territories:
            self._grant(territory)

    # -- what is known ------------------------------------------------------------------------------------------------

    def _grant(self, territory: Territory) -> None:
        tensor = territory.view
        if not tensor.numel():
            return
        region = self.know(tensor, f"`{territory.name}`", 0)
        if not len(region.flags):
            return
        if tensor.dim():
            region.page = int(tensor.storage_offset()), max(1, tensor.stride(0))
        full = WRITTEN if territory.held or not territory.output else 0
        rights: Any = OWN | READ | full | (WRITE if territory.output else 0)
        view = region.view(tensor)
        if territory.owned is not None:
            owned = territory.owned.numpy()
            rights = np.where(owned, rights, rights & ~READ).astype(np.uint8)
            rights = rights.reshape(*owned.shape, *[1] * (view.ndim - owned.ndim))
        view |= rights
        if territory.fresh:
            region.take_as_written(tensor, 0)

    def know(self, tensor: torch.Tensor, name: str, flags: int) -> Region:
        """The region of a tensor's storage, a new one with these flags where it was not known."""
        address = tensor.untyped_storage().data_ptr()
        region = self._regions.get(address)
        if region is None:
            region = self._regions[address] = Region(name, tensor)
            region.flags |= flags
            insort(self._bases, address)
            self._ordered.insert(self._bases.index(address), region)
        return region

    def is_known(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's storage was seen before; an empty one needs no knowing."""
        storage = tensor.untyped_storage()
        return not storage.nbytes() or storage.data_ptr() in self._regions

    def wrote(self, tensor: torch.Tensor) -> None:
        """Torch itself wrote a tensor."""
        region = self._regions.get(tensor.untyped_storage().data_ptr())
        if region is not None and len(region.flags) and tensor.numel():
            region.view(tensor)[...] |= WRITTEN

    @contextmanager
    def launch(self, kernel: str, arguments: Mapping[str, Any]) -> Iterator[None]:
        """One launch; a tensor not known yet, made by torch or kept from an earlier call, may be used whole."""
        for name, value in arguments.items():
            for part in value if isinstance(value, tuple) else (value,):
                tensor = getattr(part, "base", part)  # of a descriptor
                if isinstance(tensor, torch.Tensor) and not self.is_known(tensor):
                    self.know(tensor, f"the tensor passed as `{name}`", OWN | READ | WRITE | WRITTEN)
        self.launches += 1
        self._kernel, self._atomics = kernel, False
        self._dependent, self._waiting = bool(arguments.get("launch_pdl")), 0
        with _disable_current_modes():
            yield

    def waited(self) -> None:
        """The program that runs has waited for the launch before its own."""
        self._waiting = self._program()

    # -- what happens -------------------------------------------------------------------------------------------------

    def access(self, addresses: Any, mask: Any, size: int, kind: str, values: Any) -> Any:
        """Judge one access; the lanes that would touch unknown memory are told, to be left out."""
        if mask.shape != addresses.shape:
            addresses, mask = np.broadcast_arrays(addresses, mask)
        whole = mask.all()
        live = addresses.reshape(-1) if whole else addresses[mask]
        if not live.size or not self._ordered:
            return None
        if values is not None:
            values = np.broadcast_to(values, addresses.shape)
            values = values.reshape(-1) if whole else values[mask]
        if kind == "atomic":
            self._atomics = True
        at = bisect_right(self._bases, int(live[0])) - 1
        if at >= 0:
            region = self._ordered[at]
            offsets = live - np.uint64(region.base)  # below the base it wraps around to a large number
            if int(offsets.max()) + size <= region.size:
                self._inside(region, offsets, size, kind, values)
                return None
        which = np.searchsorted(np.array(self._bases, np.uint64), live, side="right") - 1
        ends = np.array([region.end for region in self._ordered], np.uint64)
        outside = (which < 0) | (live + np.uint64(size) > ends[which])
        for index in np.unique(which[~outside]):
            there = ~outside & (which == index)
            region = self._ordered[index]
            offsets = live[there] - np.uint64(region.base)
            self._inside(region, offsets, size, kind, values[there] if values is not None else None)
        if not outside.any():
            return None
        for index in np.unique(which[outside]):
            self._beside(int(index), live[outside & (which == index)], size, kind)
        left_out = np.zeros(mask.shape, np.bool_)
        left_out[mask] = outside
        return left_out

    def _inside(self, region: Region, offsets: Any, size: int, kind: str, values: Any) -> None:
        if not len(region.flags):
            return
        cells = (offsets if region.cell == 1 else offsets >> np.uint64(region.cell.bit_length() - 1)).view(np.int64)
        flags = region.flags.take(cells, mode="clip")  # all are within
        need = NEEDS[kind]
        for further in range(1, size // region.cell):
            flags &= region.flags.take(cells + further)
        if np.bitwise_and.reduce(flags) & need != need:
            self._misused(region, cells, flags, kind)
        program = self._program()
        if self._dependent and kind != "store" and self._waiting != program:
            early = region.written_by(self.launches - 1, cells)
            if early is not None and early.any():
                self._note("early", kind, region.name, region.element(cells[early][0]), int(early.sum()))
        if kind == "store":
            others = region.write(cells, program, self.launches)
            if others.any():
                self._race(region, offsets, cells, others, size, values)
            for further in range(1, size // region.cell):
                region.flags[cells + further] |= WRITTEN
        elif kind == "atomic":
            region.flags[cells] |= WRITTEN
        elif region.launch == self.launches and region.writers is not None and not self._atomics:
            before = region.writers.take(cells)
            foreign = (before > 0) & (before != program)
            if foreign.any():
                self._note("unordered", kind, region.name, region.element(cells[foreign][0]), int(foreign.sum()))

    def _misused(self, region: Region, cells: Any, flags: Any, kind: str) -> None:
        """Say of each lane that lacks a right which one it is."""
        own = (flags & OWN) != 0
        if not own.all():
            first = int(cells[~own][0])
            self._note("outside", kind, region.name, region.distance(first), int((~own).sum()))
        if kind != "load":
            closed = own & ((flags & WRITE) == 0)
            if closed.any():
                self._note("input", kind, region.name, region.element(cells[closed][0]), int(closed.sum()))
        if kind == "store":
            return
        foreign = own & ((flags & READ) == 0)
        if foreign.any():
            first, step = region.page
            where = f"page {(int(cells[foreign][0]) - first) // step}"
            self._note("unowned", kind, region.name, where, int(foreign.sum()))
        unwritten = own & ((flags & (READ | WRITTEN)) == READ)
        if unwritten.any():
            self._note("unwritten", kind, region.name, region.element(cells[unwritten][0]), int(unwritten.sum()))

    def _race(self, region: Region, offsets: Any, cells: Any, others: Any, size: int, values: Any) -> None:
        """Another program wrote these cells: wrong unless it wrote the same bits."""
        if values.dtype.itemsize != size or (offsets % np.uint64(size)).any():
            return
        whole = region.size // size
        bits = memory.bytes_at(region.base, whole * size).view(np.dtype(f"u{size}"))
        now = bits[(offsets[others] // np.uint64(size)).view(np.int64)]
        changed = now != np.ascontiguousarray(values[others]).view(bits.dtype)
        if changed.any():
            self._note("race", "store", region.name, region.element(cells[others][changed][0]), int(changed.sum()))

    def _beside(self, index: int, live: Any, size: int, kind: str) -> None:
        """Addresses in no storage that is known: named after the nearest one."""
        address = int(live[0])
        near = [(address - r.end + size, "past the end", r) for r in self._ordered[max(index, 0) : max(index, 0) + 1]]
        near += [(r.base - address, "before the start", r) for r in self._ordered[index + 1 : index + 2]]
        distance, side, region = min(((d, s, r) for d, s, r in near if d > 0), key=lambda n: n[0])
        where = f"{elements(-(-distance // size))} {side} of its storage"
        self._note("outside", kind, region.name, where, len(live))

    # -- words --------------------------------------------------------------------------------------------------------

    def _program(self) -> int:
        x, y, z = base.interpreter_builder.grid_idx
        nx, ny, _ = base.interpreter_builder.grid_dim
        return int(1 + x + nx * (y + ny * z))

    def _note(self, misuse: Misuse, kind: Any, tensor: str, where: str, count: int) -> None:
        line = source_line()
        key = misuse, kind, tensor, line
        known = self.found.get(key)
        if known is not None:
            where, program, count = known.where, known.program, known.count + count
        else:
            x, y, z = base.interpreter_builder.grid_idx
            program = int(x), int(y), int(z)
        self.found[key] = Access(misuse, kind, tensor, where, self._kernel, program, line, count)
