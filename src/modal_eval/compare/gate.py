"""The gate: which benchmarks of a suite got worse than a baseline."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modal_eval.compare.baselines import Entry, measured, what_differs
from modal_eval.compare.paired import Difference, paired_difference
from modal_eval.errors import ConfigError

PASSING = ("better", "equal", "unclear")
HEAD = ("benchmark", "before", "now", "difference", "95% interval", "n", "up / down", "verdict")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One benchmark against the baseline."""

    benchmark: str
    verdict: str
    """`worse`, `better`, `equal`, `unclear`; `incomparable` or `missing` where there is nothing to compare."""
    difference: Difference | None = None
    why: str = ""

    @property
    def passes(self) -> bool:
        """Whether the gate lets it through. What cannot be compared does not pass: nobody knows."""
        return self.verdict in PASSING

    def cells(self) -> tuple[str, ...]:
        """The texts of its row, under `HEAD`."""
        one = self.difference
        if one is None:
            return (self.benchmark, "", "", "", "", "", "", self.verdict)
        bounds = "" if one.low is None else f"{one.low:+.3f} – {one.high:+.3f}"
        return (
            self.benchmark, f"{one.before:.3f}", f"{one.now:.3f}", f"{one.difference:+.3f}", bounds, str(one.n),
            f"{one.risen} / {one.fallen}", self.verdict,
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        return {**asdict(self), "passes": self.passes}


def judge(baseline: dict[str, Any], outcomes: list[dict[str, Any]]) -> list[Verdict]:
    """A verdict for each benchmark of the baseline, and for each that a suite ran and the baseline lacks.

    `outcomes` are a suite's rows. Runs are read where they stand; one on another machine without a shared folder is
    `missing`.
    """
    before: dict[str, Entry] = baseline["benchmarks"]
    rows = {row["benchmark"]: row for row in outcomes}
    verdicts = [_verdict(name, entry, rows.get(name)) for name, entry in before.items()]
    unknown = [Verdict(name, "missing", why="the baseline does not have it") for name in rows if name not in before]
    return verdicts + unknown


def _verdict(name: str, before: Entry, row: dict[str, Any] | None) -> Verdict:
    if row is None:
        return Verdict(name, "missing", why="the suite does not have it")
    if row["status"] != "complete":
        return Verdict(name, "missing", why=f"its run is {row['status']}")
    try:
        now = measured(Path(row["run_dir"]))
    except (ConfigError, OSError) as error:
        return Verdict(name, "missing", why=f"its run cannot be read here: {error}")
    if found := what_differs(before, now):
        return Verdict(name, "incomparable", why="; ".join(found))
    try:
        difference = paired_difference(
            {int(example): rewards for example, rewards in before["scores"].items()},
            {int(example): rewards for example, rewards in now["scores"].items()},
        )
    except ValueError as error:
        return Verdict(name, "missing", why=str(error))
    return Verdict(name, difference.verdict, difference)


def markdown_gate(baseline: dict[str, Any], model: str, verdicts: list[Verdict]) -> str:
    """The verdicts as Markdown, those that do not pass named first."""
    stopped = [one.benchmark for one in verdicts if not one.passes]
    lines = [
        f"## {model} against {baseline['name']}",
        "",
        f"The baseline is {baseline['model']}, of {baseline['made_at'][:10]}.",
        "",
    ]
    lines += [f"**Does not pass: {', '.join(stopped)}.**" if stopped else "Nothing got worse.", ""]
    lines += [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    lines += [f"| {' | '.join(one.cells())} |" for one in verdicts]
    if whys := [f"* **{one.benchmark}**: {one.why}" for one in verdicts if one.why]:
        lines += ["", *whys]
    return "\n".join(lines) + "\n"
