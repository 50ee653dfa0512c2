"""What several rollouts of an example say together: pass@k, pass^k and maj@k, each with its standard error."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from modal_eval.config.models import RunConfig
from modal_eval.metrics import (
    clustered_standard_error,
    effective_sample_size,
    maj_at_k,
    mean,
    pass_at_k,
    pass_hat_k,
    wilson_interval,
)
from modal_eval.records import Row
from modal_eval.results.rows import metric_names

Estimate = Callable[[list[Row], int], float]
VERDICT = "_pass"
"""How a metric is called that is a verdict of tests (`base_pass`, `plus_pass`): it has a pass@k of its own."""


def draws(config: RunConfig, scored: list[Row]) -> dict[str, Any]:
    """`pass_at_k`, `pass_hat_k` and `maj_at_k` by name and k, `metrics_pass_at_k` of each metric that is a verdict of
    tests, `k_stderr` of each number, and the `k_examples` they stand on.

    Every k is over the same examples: those whose rollouts were all scored. Nothing is reported for rewards other than 0
    and 1, for one rollout an example unless `eval.k` asks for it (pass@1 is then the mean), and when no example is whole;
    maj@k needs rows in which the benchmark looked for an answer. Raises `ValueError` for a k above the rollouts.
    """
    rollouts = config.eval.rollouts
    found: dict[str, Any] = {"pass_at_k": {}, "pass_hat_k": {}, "maj_at_k": {}, "metrics_pass_at_k": {}}
    found |= {"k_stderr": {}, "k_examples": 0}
    if not is_binary(scored) or (rollouts == 1 and not config.eval.k):
        return found
    by_example: dict[Any, list[Row]] = defaultdict(list)
    for row in scored:
        by_example[row["example_id"]].append(row)
    whole = [rows for rows in by_example.values() if len(rows) == rollouts]
    if not whole:
        return found
    found["k_examples"] = len(whole)
    estimates: list[tuple[str, str, Estimate]] = [("pass_at_k", "pass@", _pass), ("pass_hat_k", "pass^", _pass_hat)]
    if all("extracted" in row for rows in whole for row in rows):
        estimates.append(("maj_at_k", "maj@", _maj))
    estimates += [
        ("metrics_pass_at_k", f"{metric} pass@", _pass_of(metric))
        for metric in metric_names(scored)
        if metric.endswith(VERDICT) and all(row.get(metric) in (0, 1) for rows in whole for row in rows)
    ]
    for key, name, estimate in estimates:
        for k in reported_ks(config):
            values = [estimate(rows, k) for rows in whole]
            found[key][f"{name}{k}"] = mean(values)
            found["k_stderr"][f"{name}{k}"] = clustered_standard_error([[value] for value in values])
    return found


def reported_ks(config: RunConfig) -> list[int]:
    """`eval.k`, or else the powers of two up to the rollouts, and the rollouts themselves."""
    rollouts = config.eval.rollouts
    powers = {2**power for power in range(rollouts.bit_length()) if 2**power <= rollouts}
    return sorted(set(config.eval.k or powers | {rollouts}))


def interval(scored: list[Row]) -> dict[str, float] | None:
    """Wilson's 95% interval of the mean reward, and the number of independent scores it counts; `None` for rewards other
    than 0 and 1."""
    if not is_binary(scored):
        return None
    clusters: dict[Any, list[float]] = defaultdict(list)
    for row in scored:
        clusters[row["example_id"]].append(float(row["reward"]))
    low, high = wilson_interval(list(clusters.values()))
    return {"low": low, "high": high, "level": 0.95, "effective_n": effective_sample_size(list(clusters.values()))}


def is_binary(scored: list[Row]) -> bool:
    """Whether there are rewards and each is right or wrong."""
    return bool(scored) and all(row["reward"] in (0, 1) for row in scored)


def _correct(rows: list[Row]) -> int:
    return int(sum(row["reward"] for row in rows))


def _pass(rows: list[Row], k: int) -> float:
    return pass_at_k(len(rows), _correct(rows), k)


def _pass_of(metric: str) -> Estimate:
    return lambda rows, k: pass_at_k(len(rows), int(sum(row[metric] for row in rows)), k)


def _pass_hat(rows: list[Row], k: int) -> float:
    return pass_hat_k(len(rows), _correct(rows), k)


def _maj(rows: list[Row], k: int) -> float:
    return maj_at_k([row["extracted"] or "" for row in rows], [row["reward"] for row in rows], k)
