"""Rollouts a second that the verifiers adapters manage against an instant server, without the proxy.

    python benchmarks/harness_overhead.py

Loading the environment is not counted: the rate is between the first row and the last. verifiers' own runner managed
45 to 71 rollouts/s with 0.1.14 and 1.1 with 0.4.0 (a process for each rollout) on the machine where ours was measured.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.harness import Ran, job, run
from tests.support.upstream import upstream_process

EXAMPLES, ROLLOUTS, CONCURRENT = 1000, 2, 32
ENOUGH = 100.0
OWN = {"legacy": 71.0, "v1": 1.1}


def rate(env_id: str, api: str) -> float:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with upstream_process(folder, answer="echo") as server:
            times: list[float] = []
            settings = {"env_args": {"count": EXAMPLES}, "rollouts": ROLLOUTS, "max_concurrent": CONCURRENT}
            ran: Ran = run(
                job(env_id, f"{server.url}/v1", api, **settings),
                folder,
                on_row=lambda _: times.append(time.monotonic()),
            )
        assert ran.report is not None
        assert ran.report.rows == EXAMPLES * ROLLOUTS
        return len(times) / (times[-1] - times[0])


def main() -> int:
    rates = {"legacy": rate("echo-env", "legacy"), "v1": rate("plain-taskset", "v1")}
    for api, value in rates.items():
        print(f"verifiers {api}: {value:.0f} rollouts/s, {value / OWN[api]:.1f} times the package's own runner")
    return 0 if min(rates.values()) >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
