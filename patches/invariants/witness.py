"""Who watches what happens, store by store, and says after each step what was seen."""

from dataclasses import replace

from emu.machine import Machine
from patches.invariants.finding import Finding, Report

__all__ = ["Witness"]


class Witness:
    """One invariant that is judged while things happen, on one machine, from now on.

    Whoever derives from it listens, counts `_checks` and appends to `_findings`.
    """

    def __init__(self, machine: Machine, invariant: str) -> None:
        self._machine = machine
        self._invariant = invariant
        self._checks = 0
        self._findings: list[Finding] = []

    def report(self, step: str) -> Report:
        """What was checked and found since the last report."""
        checks, self._checks = self._checks, 0
        found, self._findings = self._findings, []
        return Report(step, {self._invariant: checks}, tuple(replace(each, step=step) for each in found))
