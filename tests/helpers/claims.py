"""The table of claims that ends `pytest -m gpu`: each holds, fails, or was not tried."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["holds", "fails", "not tried"]


@dataclass(frozen=True)
class Tried:
    """What a test has come to: a claim holds or fails, or was not tried for a `reason`; `numbers` are what it has measured."""

    claim: str
    test: str
    outcome: Outcome
    reason: str = ""
    numbers: list[str] = field(default_factory=list)


def verdict(tests: Iterable[Tried]) -> tuple[Outcome, str]:
    """What all tests of a claim have come to, and more about it: which have failed, or why some were not tried."""
    by_outcome: dict[Outcome, list[Tried]] = {"holds": [], "fails": [], "not tried": []}
    for test in tests:
        by_outcome[test.outcome].append(test)
    reasons = "; ".join(dict.fromkeys(test.reason for test in by_outcome["not tried"]))
    if by_outcome["fails"]:
        return "fails", ", ".join(test.test for test in by_outcome["fails"])
    if by_outcome["holds"]:
        missing, total = len(by_outcome["not tried"]), sum(map(len, by_outcome.values()))
        return "holds", f"in {total - missing} of {total} tests; not tried: {reasons}" if missing else ""
    return "not tried", reasons


def table(tests: list[Tried]) -> list[str]:
    """The lines of the table, a claim after another in the order of the tests, and how many there are of each outcome."""
    claims: dict[str, list[Tried]] = {}
    for test in tests:
        claims.setdefault(test.claim, []).append(test)
    counts, lines = dict.fromkeys(("holds", "fails", "not tried"), 0), []
    for claim, of_claim in claims.items():
        outcome, more = verdict(of_claim)
        counts[outcome] += 1
        lines.append(f"{outcome:9}  {claim}")
        lines += [f"{'':11}({more})"] if more else []
        lines += [f"{'':11}{number}" for test in of_claim for number in test.numbers]
    total = f"{len(claims)} claims: {counts['holds']} hold, {counts['fails']} fail, {counts['not tried']} were not tried"
    return [*lines, "", total]
