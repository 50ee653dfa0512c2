"""How long a batch of evaluations takes on two nodes of eight GPUs: the queue's rule against splits made beforehand.

`python benchmarks/batch_makespan.py`. The batch is the team's own: 6 checkpoints × 5 tasks, one GPU each. Nothing is run:
the clock is simulated, the rule is the real one (`modal_eval.gpus.rule.assign`), asked on each node whenever a job ends.
The batch hands out its longest job first; that order is its own choice, the rule serves whoever asks.

Times are drawn around what such jobs take on an A100 with a model of 1.7 billion parameters: 90 s until vLLM answers, then
the task's tokens at 12,000 a second. A checkpoint's answers are longer or shorter than another's (a trained one thinks
longer), and no two jobs are alike. These are guesses at sizes, not measurements; the ratios are what is of interest.

The team's page has two ways to split a batch beforehand: its batch script gives all tasks of a checkpoint to one GPU, which
is what the page says to type for this batch; and its worker script gives each node a half of a list of jobs.

As long as a job has one GPU, no schedule can beat the best of these splits by more than the bound does, and mostly that is
less than 1.3 ×: the longest job alone takes as long as everything. What goes beyond divides that job, by
`vllm.data_parallel_size`: each replica takes its share of the questions, and pays for a start of its own. That is tried
without knowing how long a checkpoint's answers are (two replicas for the task that is longest for all), and with times
known to 15 %, as from the checkpoint before. Servers kept for the next task of their checkpoint (`--keep`) save GPU-hours,
and time only where the longest job does not decide. Exit 1 when a promise is not kept.
"""

from __future__ import annotations

import heapq
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
KNOWN_TO = 0.15
DRAWS = 200
WANTED_BOUND, WANTED_GAIN = 1.10, 1.3


@dataclass(frozen=True)
class Job:
    checkpoint: int
    task: str
    ready_s: float
    divisible_s: float
    """What replicas share: the answers."""
    besides_s: float

    @property
    def seconds(self) -> float:
        return self.on(1)

    def on(self, replicas: int) -> float:
        """How long it takes on so many GPUs, each with a server of its own."""
        return self.ready_s + self.divisible_s / replicas + self.besides_s


def draw(chance: random.Random) -> list[Job]:
    """One batch in the order in which a script lists it: checkpoint by checkpoint, task by task."""
    jobs = []
    for checkpoint in range(CHECKPOINTS):
        length = chance.uniform(*LENGTHS)
        for task, (tokens, besides_s) in TASKS.items():
            noise = chance.uniform(*NOISE)
            jobs.append(
                Job(checkpoint, task, READY_S * noise, tokens * length / TOKENS_PER_S * noise, besides_s * noise)
            )
    return jobs


def guessed(jobs: Sequence[Job]) -> list[Job]:
    """What one may know of a batch beforehand: each checkpoint's answers are as long as its predecessor's, to 15 %."""
    chance = random.Random(jobs[0].seconds)
    known = [chance.uniform(1 - KNOWN_TO, 1 + KNOWN_TO) for _ in range(CHECKPOINTS)]
    return [replace(job, divisible_s=job.divisible_s * known[job.checkpoint]) for job in jobs]


def lower_bound(jobs: Sequence[Job]) -> float:
    """No schedule can be faster: all GPUs busy all the time, or the longest job alone."""
    return max(sum(job.seconds for job in jobs) / (NODES * GPUS_EACH), max(job.seconds for job in jobs))


def by_the_queue(jobs: Sequence[Job]) -> float:
    """The longest job first to whichever node's rule has a GPU for it now."""
    return handed_out(jobs, jobs, [1] * len(jobs))


def by_the_queue_divided_blindly(jobs: Sequence[Job]) -> float:
    """The same with two replicas for the task that is the longest, whatever the checkpoint."""
    longest = max(TASKS, key=lambda task: TASKS[task][0])
    return handed_out(jobs, jobs, [2 if job.task == longest else 1 for job in jobs])


def by_the_queue_divided(jobs: Sequence[Job]) -> float:
    """The same with as many replicas for each job as make the batch the shortest by what is known beforehand."""
    known = guessed(jobs)
    share = sum(job.seconds for job in known) / (NODES * GPUS_EACH)
    return handed_out(jobs, known, min(widths(known, share), key=lambda some: handed_out(known, known, some)))


def widths(jobs: Sequence[Job], share: float) -> list[list[int]]:
    """Ways to divide a batch so that no job takes much longer than each GPU's share of it."""
    limits = [share * tenths / 10 for tenths in range(8, 25)]
    return [
        [next((n for n in range(1, GPUS_EACH) if job.on(n) <= limit), GPUS_EACH) for job in jobs] for limit in limits
    ]


def handed_out(jobs: Sequence[Job], known: Sequence[Job], replicas: Sequence[int]) -> float:
    """When the last of `jobs` ends. They ask in the order of `known`, the longest first, each for its GPUs on one node."""
    nodes = [[f"node{node}-gpu{gpu}" for gpu in range(GPUS_EACH)] for node in range(NODES)]
    busy: list[set[str]] = [set() for _ in nodes]
    ends: list[tuple[float, int, tuple[str, ...]]] = []
    owed = sorted(range(len(jobs)), key=lambda one: -known[one].on(replicas[one]))
    now = 0.0
    while owed or ends:
        for one in list(owed):
            for node in sorted(range(NODES), key=lambda each: -len(busy[each])):  # leave room in one piece
                free = [gpu for gpu in nodes[node] if gpu not in busy[node]]
                given = assign([Request(0, replicas[one], frozenset(nodes[node]))], free, busy[node])
                if given:
                    busy[node].update(given[0])
                    heapq.heappush(ends, (now + jobs[one].on(replicas[one]), node, given[0]))
                    owed.remove(one)
                    break
        now, node, gpus = heapq.heappop(ends)
        busy[node].difference_update(gpus)
    return now


def by_kept_servers(jobs: Sequence[Job]) -> float:
    """The longest job first, except that a GPU whose server is warm goes on with its checkpoint unless another job is
    longer by more than a start."""
    gpus: list[tuple[float, int, int]] = [(0.0, gpu, -1) for gpu in range(NODES * GPUS_EACH)]
    owed = sorted(jobs, key=lambda job: -job.seconds)
    end = 0.0
    while owed:
        now, gpu, warm = heapq.heappop(gpus)
        own = next((job for job in owed if job.checkpoint == warm), None)
        job = own if own and owed[0].seconds - own.seconds <= READY_S else owed[0]
        owed.remove(job)
        now += job.seconds - (job.ready_s if job.checkpoint == warm else 0)
        end = max(end, now)
        heapq.heappush(gpus, (now, gpu, job.checkpoint))
    return end


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


def best_split(jobs: Sequence[Job]) -> float:
    return min(way(jobs) for way in (by_checkpoint, by_turns, by_neighbours))


WAYS: dict[str, Callable[[Sequence[Job]], float]] = {
    "lower bound, a GPU a job": lower_bound,
    "the queue": by_the_queue,
    "the queue, servers kept": by_kept_servers,
    "the queue, MATH on two GPUs": by_the_queue_divided_blindly,
    "the queue, replicas by times": by_the_queue_divided,
    "static: a GPU a checkpoint": by_checkpoint,
    "static: halves, neighbours": by_neighbours,
    "static: halves, every eighth": by_turns,
    "static: the best of the three": best_split,
}


def main() -> int:
    batches = [draw(random.Random(seed)) for seed in range(DRAWS)]
    times = {name: [way(batch) for batch in batches] for name, way in WAYS.items()}
    bound, best = times["lower bound, a GPU a job"], times["static: the best of the three"]
    print(f"{CHECKPOINTS} checkpoints × {len(TASKS)} tasks on {NODES}×{GPUS_EACH} GPUs, {DRAWS} draws")
    print(f"{'':30} {'median':>8} {'× the bound':>12} {'at worst':>9} {'best split is slower by':>24} {'at least':>9}")
    for name, seconds in times.items():
        bounds, gains = over(seconds, bound), over(best, seconds)
        row = f"{name:30} {statistics.median(seconds):6.0f} s {statistics.median(bounds):12.2f} {max(bounds):9.2f}"
        print(row + ("" if name.startswith("static") else f"{statistics.median(gains):22.2f} × {min(gains):9.2f}"))
    ceiling = over(best, bound)
    out_of_reach = sum(one < WANTED_GAIN for one in ceiling)
    print(
        f"With a GPU a job, {WANTED_GAIN} × over the best split is beyond the bound itself in {out_of_reach} of {DRAWS} draws "
        f"(in the median the bound allows {statistics.median(ceiling):.2f} ×)."
    )
    queue, divided = times["the queue"], times["the queue, replicas by times"]
    kept = promise(
        f"in every draw the queue is within {WANTED_BOUND} × the bound", max(over(queue, bound)), WANTED_BOUND
    )
    kept &= promise("so is it with replicas by times in every draw", max(over(divided, bound)), WANTED_BOUND)
    by_script = over(times["static: a GPU a checkpoint"], queue)
    kept &= promise(
        f"in every draw it is {WANTED_GAIN} × faster than a GPU a checkpoint", min(by_script), WANTED_GAIN, least=True
    )
    gain = statistics.median(over(best, divided))
    kept &= promise(
        f"with replicas by times it is {WANTED_GAIN} × faster than the best split, in the median",
        gain,
        WANTED_GAIN,
        least=True,
    )
    return 0 if kept else 1


def over(some: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(some, others, strict=True)]


def promise(what: str, measured: float, limit: float, *, least: bool = False) -> bool:
    held = measured >= limit if least else measured <= limit
    print(f"{'kept' if held else 'MISSED'}: {what} ({measured:.2f} ×)")
    return held


if __name__ == "__main__":
    sys.exit(main())
