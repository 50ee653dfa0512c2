"""The difference of two scores that the same examples gave. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modal_eval.metrics import Z_95, clustered_standard_error, mean

Scores = Mapping[int, Sequence[float]]
"""The rewards of each example's rollouts."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean difference over the examples that both sides have, now minus before."""

    before: float
    """Mean of the earlier scores, over those examples."""
    now: float
    difference: float
    stderr: float | None
    """`None` for a single example, which says nothing about how examples differ."""
    low: float | None
    high: float | None
    """The 95% interval of the difference."""
    n: int
    """Examples that both sides have."""
    risen: int
    fallen: int
    """Examples whose mean is higher, or lower, than before."""

    @property
    def verdict(self) -> str:
        """`worse` or `better` where the interval leaves 0 out, `equal` where nothing changed, else `unclear`."""
        if self.risen == self.fallen == 0:
            return "equal"
        if self.low is None or self.high is None:
            return "unclear"
        return "worse" if self.high < 0 else "better" if self.low > 0 else "unclear"


def paired_difference(before: Scores, now: Scores) -> Difference:
    """The mean over examples of (mean reward now − mean reward before), with its standard error and 95% interval.

    Pairing takes out how hard the examples are, which is most of what two scores vary by (Miller 2024, arXiv:2411.00640,
    section 4.2): with `d` the differences of `n` examples, the standard error is `sd(d) / sqrt(n)`, and the interval
    reaches 1.96 of them to both sides, cut at −1 and 1 for rewards between 0 and 1. It is the normal approximation: with
    fewer than some 30 examples it is too narrow by a few percent.

    Each example counts once, however many rollouts it had on either side; one without a scored rollout on either side is
    left out. Raises `ValueError` when no example is left.

    >>> paired_difference({0: [1.0], 1: [0.0]}, {0: [1.0], 1: [1.0]}).difference
    0.5
    """
    both = sorted(key for key in before if before[key] and now.get(key))
    if not both:
        raise ValueError("no example was scored on both sides, so there is no difference")
    pairs = [(mean(before[key]), mean(now[key])) for key in both]
    steps = [after - earlier for earlier, after in pairs]
    centre, stderr = mean(steps), clustered_standard_error([[step] for step in steps])
    bounded = all(0 <= score <= 1 for pair in pairs for score in pair)
    reach = None if stderr is None else Z_95 * stderr
    low, high = (None, None) if reach is None else (centre - reach, centre + reach)
    if bounded and low is not None and high is not None:
        low, high = max(-1.0, low), min(1.0, high)
    return Difference(
        mean([earlier for earlier, _ in pairs]), mean([after for _, after in pairs]), centre, stderr, low, high, len(both),
        sum(step > 0 for step in steps), sum(step < 0 for step in steps),
    )  # fmt: skip
