"""How long a batch of evaluations takes on two nodes of eight GPUs: the queue's rule against splits made beforehand.

`python benchmarks/batch_makespan.py`. The batch is the team's own: 6 checkpoints × 5 tasks, one GPU each. Nothing is run:
the clock is simulated, the rule is the real one (`modal_eval.gpus.rule.assign`), asked on each node whenever a job ends.
The batch hands out its longest job first; that order is its own choice, the rule serves whoever asks.

Times are drawn around what such jobs take on an A100 with a model of 1.7 billion parameters: 90 s until vLLM answers, then
the task's tokens at 12,000 a second. A checkpoint's answers are longer or shorter than another's (a trained one thinks
longer), and no two jobs are alike. These are guesses at sizes, not measurements; the ratios are what is of interest.

The team's page has two ways to split a batch beforehand: its batch script gives all tasks of a checkpoint to one GPU, which
is the one that the promise is about, since it is what the page says to type for this batch; and its worker script gives
each node a half of a list of jobs. Exit 1 when a promise is not kept.
"""

from __future__ import annotations

import heapq
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modal_eval.gpus.rule import Request, assign

NODES, GPUS_EACH = 2, 8
CHECKPOINTS = 6
READY_S, TOKENS_PER_S = 90.0, 12_000.0
TASKS = {  # examples × tokens of an answer, and seconds for what is done besides
    "gsm8k 8-shot": (1319 * 150, 10.0),
    "gsm8k 4-shot": (1319 * 150, 5.0),
    "hendrycks_math": (5000 * 600, 20.0),
    "ifeval": (541 * 1100, 5.0),
    "mbpp": (500 * 256, 60.0),
}
LENGTHS = (0.7, 1.5)
"""How many tokens a checkpoint needs, relative to the base model."""
NOISE = (0.9, 1.15)
DRAWS = 200
WANTED_BOUND, WANTED_GAIN = 1.10, 1.3


@dataclass(frozen=True)
class Job:
    checkpoint: int
    task: str
    seconds: float


def draw(chance: random.Random) -> list[Job]:
    """One batch in the order in which a script lists it: checkpoint by checkpoint, task by task."""
    jobs = []
    for checkpoint in range(CHECKPOINTS):
        length = chance.uniform(*LENGTHS)
        for task, (tokens, besides_s) in TASKS.items():
            seconds = READY_S + tokens * length / TOKENS_PER_S + besides_s
            jobs.append(Job(checkpoint, task, seconds * chance.uniform(*NOISE)))
    return jobs


def lower_bound(jobs: Sequence[Job]) -> float:
    """No schedule can be faster: all GPUs busy all the time, or the longest job alone."""
    return max(sum(job.seconds for job in jobs) / (NODES * GPUS_EACH), max(job.seconds for job in jobs))


def by_the_queue(jobs: Sequence[Job]) -> float:
    """The longest job first to whichever node's rule has a GPU for it now."""
    nodes = [[f"node{node}-gpu{gpu}" for gpu in range(GPUS_EACH)] for node in range(NODES)]
    busy: list[set[str]] = [set() for _ in nodes]
    ends: list[tuple[float, int, str]] = []
    owed = sorted(jobs, key=lambda job: -job.seconds)
    now = 0.0
    while owed or ends:
        for node, gpus in enumerate(nodes):
            while owed:
                free = [gpu for gpu in gpus if gpu not in busy[node]]
                given = assign([Request(0, 1, frozenset(gpus))], free, busy[node])
                if not given:
                    break
                (gpu,) = given[0]
                busy[node].add(gpu)
                heapq.heappush(ends, (now + owed.pop(0).seconds, node, gpu))
        now, node, gpu = heapq.heappop(ends)
        busy[node].remove(gpu)
    return now


def by_checkpoint(jobs: Sequence[Job]) -> float:
    """The batch script: each checkpoint has its GPU, where its five tasks run one after the other."""
    return max(sum(job.seconds for job in jobs if job.checkpoint == one) for one in range(CHECKPOINTS))


def by_turns(jobs: Sequence[Job]) -> float:
    """The worker script, read one way: half of the list for each node, where GPU g does every eighth job."""
    return max(sum(job.seconds for job in half[gpu::GPUS_EACH]) for half in halves(jobs) for gpu in range(GPUS_EACH))


def by_neighbours(jobs: Sequence[Job]) -> float:
    """The worker script, read the other way: half of the list for each node, where GPU g does the g-th pair of jobs."""
    return max(
        sum(job.seconds for job in half[gpu : gpu + 2]) for half in halves(jobs) for gpu in range(0, len(half), 2)
    )


def halves(jobs: Sequence[Job]) -> list[Sequence[Job]]:
    half = len(jobs) // NODES
    return [jobs[node * half : (node + 1) * half] for node in range(NODES)]


def main() -> int:
    batches = [draw(random.Random(seed)) for seed in range(DRAWS)]
    ways: dict[str, Callable[[Sequence[Job]], float]] = {
        "lower bound": lower_bound,
        "the queue": by_the_queue,
        "static: a GPU a checkpoint": by_checkpoint,
        "static: halves, neighbours": by_neighbours,
        "static: halves, every eighth": by_turns,
    }
    times = {name: [way(batch) for batch in batches] for name, way in ways.items()}
    print(f"{CHECKPOINTS} checkpoints × {len(TASKS)} tasks on {NODES}×{GPUS_EACH} GPUs, {DRAWS} draws")
    print(f"{'':28} {'median':>8} {'× the bound':>12} {'at worst':>9} {'queue faster by':>16}")
    for name, seconds in times.items():
        bounds, gains = over(seconds, times["lower bound"]), over(seconds, times["the queue"])
        middle = statistics.median(seconds)
        row = f"{name:28} {middle:6.0f} s {statistics.median(bounds):12.2f} {max(bounds):9.2f}"
        print(row + (f"{statistics.median(gains):14.2f} ×" if name.startswith("static") else ""))
    worst = max(over(times["the queue"], times["lower bound"]))
    gain = min(over(times["static: a GPU a checkpoint"], times["the queue"]))
    kept = promise(f"in every draw the queue is within {WANTED_BOUND} × the bound", worst, worst <= WANTED_BOUND)
    kept &= promise(f"in every draw it is {WANTED_GAIN} × faster than a GPU a checkpoint", gain, gain >= WANTED_GAIN)
    return 0 if kept else 1


def over(some: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(some, others, strict=True)]


def promise(what: str, measured: float, held: bool) -> bool:
    print(f"{'kept' if held else 'MISSED'}: {what} ({measured:.2f} ×)")
    return held


if __name__ == "__main__":
    sys.exit(main())
