"""Pure arithmetic over rewards. Every function refuses what it cannot estimate instead of returning a near miss."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that at least one of `k` samples, drawn without replacement, is correct.

    The unbiased estimator of Chen et al. 2021 (arXiv:2107.03374, eq. 1): `1 - C(n - c, k) / C(n, k)` for `n` samples
    of which `c` are correct. When fewer than `k` are wrong, `C(n - c, k)` is 0 and the result is 1.

    Raises `ValueError` when `k > num_samples`: no unbiased estimate exists there, and reporting pass@n under the name
    pass@k would be a different number.

    >>> pass_at_k(num_samples=4, num_correct=1, k=1)
    0.25
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct={num_correct} is not between 0 and num_samples={num_samples}")
    if not 1 <= k <= num_samples:
        raise ValueError(
            f"pass@{k} cannot be estimated from {num_samples} samples; k must be between 1 and their number"
        )
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; raises `ValueError` for no values, which have none."""
    if not values:
        raise ValueError("no values, so no mean")
    return math.fsum(values) / len(values)


def clustered_standard_error(clusters: Sequence[Sequence[float]]) -> float | None:
    """Standard error of the mean over all values, when values of one cluster (the rollouts of one example) go together.

    The cluster-robust estimator (Miller 2024, arXiv:2411.00640, section 2.2) with the usual small-sample factor
    `G / (G - 1)`: `sqrt(G/(G-1) · Σ_g (Σ_i (x_gi - mean))²) / n`, for `G` clusters and `n` values. With one value a
    cluster it equals the sample standard deviation over `sqrt(n)`.

    `None` for fewer than two clusters: one example says nothing about how examples differ. Empty clusters are left out.

    >>> clustered_standard_error([[0.0], [1.0]])
    0.5
    """
    kept = [cluster for cluster in clusters if cluster]
    if len(kept) < 2:
        return None
    values = [value for cluster in kept for value in cluster]
    centre = mean(values)
    spread = math.fsum(math.fsum(value - centre for value in cluster) ** 2 for cluster in kept)
    return math.sqrt(len(kept) / (len(kept) - 1) * spread) / len(values)
