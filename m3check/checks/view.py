"""One result as the checks look at it: the tensors, and which request, position and visible blocks each row has."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from m3check.checks.setting import Setting
from m3check.types import BLOCK, Case, Inputs, Op, Outputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from m3check.paging import Run


@dataclass(frozen=True)
class Rows:
    """Geometry of the T query rows, as int64 tensors on one device."""

    request: Tensor  # [T]
    query: Tensor  # [T] index of the row within its request
    position: Tensor  # [T] token position; negative in a dead row
    visible: Tensor  # [T] blocks that the row sees
    kv_start: Tensor  # [T] first of the request's rows among the N tokens
    kv_len: Tensor  # [T]

    @classmethod
    def of(cls, case: Case, device: torch.device) -> Rows:
        """The rows of a batch, request by request."""
        requests = list(case.requests())
        lengths = torch.tensor([request.query_len for request in requests], dtype=torch.int64)

        def each(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64).repeat_interleave(lengths).to(device)

        query = torch.arange(case.total_queries, device=device) - each([r.query_start for r in requests])
        position = query + each([r.prefix for r in requests])
        visible = (position + BLOCK).div(BLOCK, rounding_mode="floor").clamp(min=0)
        start, length = each([r.kv_start for r in requests]), each([r.kv_len for r in requests])
        return cls(each([r.index for r in requests]), query, position, visible, start, length)

    def name(self, row: int) -> str:
        """A row in the words of a user: request and token position."""
        return f"request {int(self.request[row])}, query {int(self.query[row])} (position {int(self.position[row])})"


@dataclass
class View:
    """What one result offers to the checks; costly analyses are made once and kept in `memo`."""

    op: Op
    problem: Inputs
    run: Run
    expected: Outputs
    setting: Setting
    expected_on: Callable[[Tensor], Outputs] | None = None
    memo: dict[str, Any] = field(default_factory=dict)

    @property
    def case(self) -> Case:
        """The case that ran."""
        return self.problem.case

    @cached_property
    def device(self) -> torch.device:
        """Where the outputs are."""
        return next(iter(self.run.outputs.values())).device

    @cached_property
    def rows(self) -> Rows:
        """Geometry of the query rows."""
        return Rows.of(self.case, self.device)

    def actual(self, name: str) -> Tensor:
        """What the kernel gave."""
        return self.run.outputs[name]

    @cached_property
    def span(self) -> int:
        """Tokens that one listed id stands for."""
        return 1 if self.op.family == "latent" else BLOCK

    @cached_property
    def last(self) -> Tensor:
        """[T] the last token that a row may attend to: its own, or any of its request where the list alone decides."""
        return self.rows.kv_len - 1 if self.op.family == "latent" else self.rows.position

    @cached_property
    def listable(self) -> Tensor:
        """[T] how many ids, from 0, name something that a row may attend to."""
        return self.rows.kv_len if self.op.family == "latent" else self.rows.visible

    def tokens(self, ids: Tensor) -> Tensor:
        """The tokens [..., span · n] that ids [..., n] stand for; negative for a negative id."""
        within = torch.arange(self.span, device=ids.device)
        return (ids[..., None] * self.span + within).flatten(-2)

    @cached_property
    def attended(self) -> Tensor:
        """The id lists [H, T, topk] that attention was given: the op's input, or in a chain the kernel's own selection."""
        ids = self.problem.topk_idx if self.problem.topk_idx is not None else self.run.outputs["ids"]
        return ids.to(self.device).long()

    def on_own_ids(self, name: str) -> Tensor:
        """An output as it should be on the attended ids."""
        ids = self.problem.topk_idx
        if ids is None and self.expected_on is not None:
            if "on_own_ids" not in self.memo:
                self.memo["on_own_ids"] = self.expected_on(self.run.outputs["ids"])
            return self.memo["on_own_ids"][name].to(self.device)  # type: ignore[no-any-return]
        return self.expected[name].to(self.device)

    @cached_property
    def expected_out(self) -> Tensor:
        """Attention [T, Hq, D] as it should be on the attended ids."""
        if self.problem.topk_idx is None and self.expected_on is not None:
            return self.expected_on(self.run.outputs["ids"])["out"].to(self.device)
        return self.expected["out"].to(self.device)


def chunks(count: int, size: int) -> list[slice]:
    """`count` things in runs of at most `size`."""
    return [slice(i, min(i + size, count)) for i in range(0, count, max(size, 1))]
