"""Without repairs Triton's interpreter gives wrong answers, with them right ones; what was right stays, bit for bit."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from m3check import interpret
from m3check.interpret import formats

SCRIPT = pathlib.Path(__file__).with_name("interpreted.py")
TORCH = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp8e4b8": torch.float8_e4m3fnuz,
    "fp8e5b16": torch.float8_e5m2fnuz,
}
REPAIRS = [
    "scalar index",
    "boolean arguments",
    "annotated arguments",
    "fnuz types",
    "masks",
    "bf16 rounding",
    "fp8 conversions",
    "bf16 casts",
    "bf16 constants",
    "bf16 operators",
    "bf16 sum",
    "narrow dot",
    "comparisons",
    "unsigned inversion",
    "maximum of numbers",
    "dependent launch",
    "autotune",
]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=300, check=False)


@functools.cache
def outcomes(how: str) -> Any:
    pytest.importorskip("triton")
    done = python(str(SCRIPT), how)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_repair_has_a_test():
    assert list(outcomes("repaired")["repairs"]) == REPAIRS


@pytest.mark.parametrize("name", REPAIRS)
def test_a_repair_mends_what_it_names_and_is_left_out_where_nothing_is_wrong(name):
    plain, repaired = outcomes("plain"), outcomes("repaired")
    needed, installed, detail = repaired["repairs"][name]
    wrong = [said for said in plain["defects"][name] if said]
    assert needed == bool(wrong), f"{name}: needed is {needed} where the plain interpreter said {wrong}"
    assert installed == needed, detail
    assert [said for said in repaired["defects"][name] if said] == []


def test_what_was_right_is_right_in_both():
    for how in ("plain", "repaired"):
        assert {name: said for name, said in outcomes(how)["sound"].items() if said} == {}, how


def test_repairs_and_remembered_types_change_no_bit_of_an_fp32_kernel():
    assert len(outcomes("plain")["bytes"]) == 64
    assert outcomes("repaired")["bytes"] == outcomes("plain")["bytes"]


@pytest.mark.parametrize("name", ["autotune_pins", "language_is_put_back", "watchers_see_addresses"])
def test_control(name):
    assert outcomes("repaired")["ours"][name] is None


def test_without_the_interpreter_install_says_so():
    done = python("-c", "from m3check.interpret import install; install()", TRITON_INTERPRET="0")
    assert done.returncode == 1
    assert "TRITON_INTERPRET=1 must be in the environment" in done.stderr


def test_a_repair_that_does_not_help_or_does_not_fit_is_not_installed():
    def fails() -> None:
        raise AttributeError("no such method")

    assert interpret._one("a", lambda: "2 for 3", lambda: None) == interpret.Repair(
        "a", needed=True, installed=False, detail="2 for 3; after the repair: 2 for 3"
    )
    assert interpret._one("a", lambda: "2 for 3", fails).detail == "2 for 3; the repair does not fit: no such method"
    assert interpret._one("a", lambda: None, fails) == interpret.Repair(
        "a", needed=False, installed=False, detail="sound in this Triton"
    )


# -- the number formats, against torch --------------------------------------------------------------------------------


def numbers(kind: str) -> tuple[np.ndarray, torch.Tensor]:
    """All 65,536 values of a 16-bit type, or fp32 numbers of every binade with all interesting tails."""
    if kind == "fp32":
        tails = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
        bits = (np.arange(65536, dtype=np.uint32)[:, None] << np.uint32(16) | tails).reshape(-1)
        values = bits.view(np.float32)
        return values, torch.from_numpy(values)
    codes = np.arange(65536, dtype=np.uint16)
    typed = torch.from_numpy(codes.view(np.int16)).view(torch.bfloat16 if kind == "bf16" else torch.float16)
    return (codes if kind == "bf16" else codes.view(np.float16)), typed


def same(got: np.ndarray, want: torch.Tensor) -> None:
    np.testing.assert_array_equal(got, want.float().numpy())
    signed = ~np.isnan(got)
    np.testing.assert_array_equal(np.signbit(got)[signed], np.signbit(want.float().numpy())[signed])


@pytest.mark.parametrize("name", formats.FP8)
def test_all_256_codes_of_fp8_decode_as_in_torch(name):
    codes = torch.arange(256, dtype=torch.uint8)
    same(formats.decode(codes.numpy(), name), codes.view(TORCH[name]))
    for target, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        wide = formats.convert(codes.numpy(), name, target)
        same(formats.bf16_to_fp32(wide) if target == "bf16" else wide, codes.view(TORCH[name]).to(kind))


@pytest.mark.parametrize("source", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", formats.FP8)
def test_fp8_rounds_as_torch_and_saturates_as_the_hardware(name, source):
    values, typed = numbers(source)
    wide = typed.float()
    if not formats.FP8[name].fnuz:
        top = torch.finfo(TORCH[name]).max
        wide = wide.clamp(-top, top)  # cvt.rn.satfinite; torch gives NaN or infinity
    same(formats.decode(formats.convert(values, source, name), name), wide.to(TORCH[name]))


@pytest.mark.parametrize("source", ["fp32", "fp16", "fp8e4nv"])
def test_bf16_rounds_to_the_nearest_even(source):
    if source == "fp8e4nv":
        values = np.arange(256, dtype=np.uint8)
        want = torch.from_numpy(values).view(TORCH[source]).bfloat16()
    else:
        values, typed = numbers(source)
        want = typed.bfloat16()
    same(formats.bf16_to_fp32(formats.convert(values, source, "bf16")), want)


@pytest.mark.parametrize("target", ["bf16", "fp16", *formats.FP8])
def test_rounding_towards_zero_takes_the_nearer_neighbour_of_zero(target):
    values, _ = numbers("fp32")
    values = values[np.isfinite(values)]
    out = formats.convert(values, "fp32", target, truncate=True)
    wide = out.astype(np.float64) if target == "fp16" else formats.decode(out, target).astype(np.float64)
    grid = np.arange(65536, dtype=np.uint16)
    every = {"bf16": formats.bf16_to_fp32(grid), "fp16": grid.view(np.float16)}.get(target)
    every = formats.fp8_values(target) if every is None else every
    every = np.unique(np.abs(every[np.isfinite(every)].astype(np.float64)))
    want = every[np.searchsorted(every, np.abs(values.astype(np.float64)), side="right") - 1]
    np.testing.assert_array_equal(np.abs(wide), want)
