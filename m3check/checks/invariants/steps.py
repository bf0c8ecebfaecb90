"""A mixed batch after another one: what the step before left in persistent memory, and metadata that a graph captured."""

from __future__ import annotations

from m3check.checks.invariants.trial import Trial
from m3check.paging import World
from m3check.types import Finding, Status


def other(trial: Trial) -> list[Finding]:
    """Another batch served before, with more decoded requests or with fewer, leaves ids and lengths that nobody reads."""
    run = trial.call(trial.inputs, World(earlier="other"))
    return [trial.same("steps", "another batch, of another number of decoded requests, was served before", run)]


def stale(trial: Trial) -> list[Finding]:
    """Metadata of a batch of the same shape and other lengths, their memory filled anew; a captured graph has no others.

    On a device they are those of a real graph: captured on the batch before, replayed on this one.
    """
    change = "the metadata were those of the batch before, whose memory holds this one's lengths"
    if trial.captured is None:
        return [trial.same("stale", change, trial.call(trial.inputs, World(earlier="stale")))]
    run = trial.captured()
    if isinstance(run, str):
        return [Finding("stale", Status.FAILED, 1.0, 0.0, "", f"{run}; decoded requests alone are served from a graph")]
    return [trial.same("stale", f"a graph was captured and replayed; {change}", run)]
