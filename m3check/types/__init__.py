"""The words of m3check as data: what a case, a kernel, a profile, a finding, a result and a record are.

Everything here is frozen and knows nothing of torch at import time, so that `m3check list`, `show` and
`compare` answer at once on a machine that has neither torch nor a GPU.
"""

from m3check.types.case import Case, Inputs, Outputs, Request
from m3check.types.heat import SHADES, Heat, HeatMap, shade
from m3check.types.kernel import ODD_SCORES, Kernel, Profile
from m3check.types.ops import OPS, SPARSE, Op, Phase
from m3check.types.record import Breach, Exit, PlanLine, Record
from m3check.types.result import RED, STRICTLY_RED, Evidence, Finding, Mismatch, Result, Status, Sums
from m3check.types.units import BEYOND, BLOCK, DTYPES, INIT_SCORE, LOCAL_SCORE, ROPE, M3CheckError, blocks, skipped

__all__ = [
    "BEYOND",
    "BLOCK",
    "DTYPES",
    "INIT_SCORE",
    "LOCAL_SCORE",
    "ODD_SCORES",
    "OPS",
    "RED",
    "ROPE",
    "SHADES",
    "SPARSE",
    "STRICTLY_RED",
    "Breach",
    "Case",
    "Evidence",
    "Exit",
    "Finding",
    "Heat",
    "HeatMap",
    "Inputs",
    "Kernel",
    "M3CheckError",
    "Mismatch",
    "Op",
    "Outputs",
    "Phase",
    "PlanLine",
    "Profile",
    "Record",
    "Request",
    "Result",
    "Status",
    "Sums",
    "blocks",
    "shade",
    "skipped",
]
