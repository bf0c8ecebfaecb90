"""What the attention tests see, measured: M3's own shape (G = 16, D = 128, topk 16: 2,048 tokens), gauss, bf16.

`pytest tests/test_sharpness.py -s` prints the figures of docs/bounds.md for a sample of the positions, `-m slow` for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
import simulate
import torch
from simulate import Edit, Style

from m3check import cases, checks, reference
from m3check.arch import Accumulator
from m3check.paging import Run
from m3check.types import BLOCK, Profile, Status

SHAPE = "sparse_attn_decode/q=1,kv=4096,h=1,g=16,topk=16"
TOKENS = 16 * BLOCK
SAMPLE = range(5, TOKENS, 83)
MMA = Accumulator(fraction_bits=23, inner=16, origin="bf16 matrix instruction")


class Bench:
    """One input, its reference, and findings for a kernel that loses tokens."""

    def __init__(self, seed: int = 0, how: Accumulator | None = None, style: Style | None = None) -> None:
        self.problem = simulate.inputs(replace(cases.parse_id(SHAPE), seed=seed))
        self.expected = reference.expected(self.problem)
        self.style = style or Style()
        how = how or Accumulator()
        self.setting = checks.Setting(profile=Profile(), evidence="interpreted", dot=how, pv=how)
        ids = self.problem.topk_idx[0, 0].long()
        self.token = (ids[:, None] * BLOCK + torch.arange(BLOCK)).flatten()  # position of each gathered token

    def findings(self, edit: Edit = simulate.RIGHT) -> dict[str, checks.Finding]:
        out = simulate.attention(self.problem, self.problem.topk_idx, self.style, edit)
        findings = checks.compare(self.problem, Run({"out": out}), self.expected, self.setting)
        return {finding.check: finding for finding in findings}

    def without(self, index: int, heads: slice | int) -> Edit:
        def change(values: torch.Tensor) -> torch.Tensor:
            values = values.clone()
            values[0, 0, heads, index] = -math.inf
            return values

        return Edit(logits=change)


def lost_tokens(bench: Bench, indices: Iterable[int], alone: bool) -> tuple[list[float], list[bool], list[bool]]:
    """(z of the token test, whether any test is red, whether it is red and the token is named rightly)."""
    z, red, named = [], [], []
    for index in indices:
        head: slice | int = index % 16 if alone else slice(None)
        found = bench.findings(bench.without(index, head))
        token = found["token"]
        z.append(token.measured)
        red.append(any(f.status is Status.FAILED for f in found.values()))
        named.append(token.status is Status.FAILED and f"token {int(bench.token[index])} " in token.hint)
    return z, red, named


def report(name: str, z: list[float], red: list[bool], named: list[bool], limit: float) -> None:
    ordered = sorted(z)
    print(
        f"\n{name}: {len(z)} positions, red {sum(red) / len(red):.1%}, red and named {sum(named) / len(named):.1%}; "
        f"z least {ordered[0]:.1f}, tenth percentile {ordered[len(z) // 10]:.1f}, median {ordered[len(z) // 2]:.1f}; "
        f"limit {limit:.2f}"
    )


@pytest.mark.parametrize("how", [Accumulator(), MMA], ids=["fp32", "mma"])
@pytest.mark.parametrize(
    "positions", [pytest.param(SAMPLE, id="sample"), pytest.param(range(TOKENS), id="all", marks=pytest.mark.slow)]
)
def test_every_token_lost_for_a_group_is_red_and_named(positions, how):
    bench = Bench(how=how)
    z, red, named = lost_tokens(bench, positions, alone=False)
    report(f"token lost for a group of 16, {how.origin}", z, red, named, bench.findings()["token"].limit)
    assert all(named)


@pytest.mark.parametrize("how", [Accumulator(), MMA], ids=["fp32", "mma"])
@pytest.mark.parametrize(
    "positions", [pytest.param(SAMPLE, id="sample"), pytest.param(range(TOKENS), id="all", marks=pytest.mark.slow)]
)
def test_a_token_lost_for_one_head_is_red_four_times_of_five(positions, how):
    bench = Bench(how=how)
    z, red, named = lost_tokens(bench, positions, alone=True)
    report(f"token lost for one head, {how.origin}", z, red, named, bench.findings()["token"].limit)
    assert sum(red) >= 0.8 * len(red)
    assert sum(named) >= 0.95 * sum(red)


@pytest.mark.parametrize("style", [Style(), Style(splits=16, partials=torch.bfloat16)], ids=["one_pass", "split"])
def test_a_one_percent_scale_is_red_in_every_seed(style):
    z = []
    for seed in range(6):
        found = Bench(seed, style=style).findings(Edit(scale=1.01))["scale"]
        assert found.status is Status.FAILED
        assert "softmax scale off by +1.0" in found.hint or "softmax scale off by +0.9" in found.hint
        z.append(found.measured)
    print(f"\nscale 1 % off: z {min(z):.0f} to {max(z):.0f} over {len(z)} seeds; limit {found.limit:.2f}")


def test_right_kernels_come_near_the_limits_but_not_over():
    """The worst measured/limit of each test over styles and seeds: bounds that are far too wide would show here."""
    styles = [
        Style(),
        Style(tile=32, lse=True),
        Style(splits=16, partials=torch.bfloat16),
        Style(splits=4, partials=torch.bfloat16, natural=True, reverse=True),
        Style(rounded_sum=True),
    ]
    worst = dict.fromkeys(("element", "row", "token", "scale"), 0.0)
    for seed in range(6):
        for style in styles:
            bench = Bench(seed, style=style)
            if style.lse:
                bench.setting = replace(bench.setting, profile=Profile(normaliser="lse"))
            found = bench.findings()
            assert all(f.status is Status.PASSED for f in found.values())
            worst = {name: max(w, found[name].measured / found[name].limit) for name, w in worst.items()}
    print("\nright kernels, worst measured/limit: " + ", ".join(f"{k} {v:.2f}" for k, v in worst.items()))
    assert min(worst.values()) > 0.2
