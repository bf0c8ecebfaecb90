"""plan() and run_one(): the only place where cases, references, kernels and checks meet."""

from m3check.runner.calling import KernelRaised, Session, call, first_call, guarded, inputs_for, setting_of
from m3check.runner.judging import Judge, Rule, verdict
from m3check.runner.memory import filled_memory
from m3check.runner.planning import chosen_cases, described, evidence_for, plan, repro, why_none
from m3check.runner.result import run_one

__all__ = [
    "Judge",
    "KernelRaised",
    "Rule",
    "Session",
    "call",
    "chosen_cases",
    "described",
    "evidence_for",
    "filled_memory",
    "first_call",
    "guarded",
    "inputs_for",
    "plan",
    "repro",
    "run_one",
    "setting_of",
    "verdict",
    "why_none",
]
