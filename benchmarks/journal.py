"""What the journal costs: durable appends a second, and how fast and how small 100,000 calls are opened for resume.

    python benchmarks/journal.py [--calls 100000] [--folder DIR]

Give a folder on the disk that the runs go to: a flush costs what that disk says.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from modal_eval.proxy.journal import Journal
from modal_eval.proxy.keys import CallKey
from modal_eval.proxy.lines import Answer, encode_answer
from modal_eval.proxy.writer import GroupWriter

IDENTITY = {"benchmark": "journal"}
WRITERS = 64
OPEN = """
import sys, time
from pathlib import Path
from modal_eval.proxy.journal import Journal

def peak_mb():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024

before = peak_mb()
began = time.perf_counter()
journal = Journal(Path(sys.argv[1]), {"benchmark": "journal"})
took = time.perf_counter() - began
print(len(journal), took, peak_mb(), before)
"""
OTHERS = {
    "NeMo Evaluator 0.3, appends with fsync": "230/s",
    "NeMo Evaluator 0.3, appends without": "33,000/s",
    "NeMo Evaluator 0.3, 100,000 records loaded": "1.2 s, 342 MB",
}


def an_answer(number: int) -> tuple[CallKey, Answer]:
    """2 to 4 KB, different for each call."""
    text = random.Random(number).randbytes(1).hex() * (900 + number % 1000)
    body = {
        "id": f"call-{number}",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 500, "total_tokens": 600},
    }
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    key = CallKey(f"{number // 4}/{number % 4}", digest, 0)
    return key, Answer(200, "application/json", json.dumps(body).encode(), (100, 500), 1234)


def write_all(path: Path, calls: int) -> None:
    journal = Journal(path, IDENTITY)
    for start in range(0, calls, 1000):
        group = [an_answer(number) for number in range(start, min(calls, start + 1000))]
        assert not any(journal.commit([(key, encode_answer(key, answer)) for key, answer in group]))
    journal.close()


def opened(path: Path) -> tuple[int, float, float, float]:
    ran = subprocess.run([sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, check=True)
    count, *figures = ran.stdout.split()
    seconds, peak_mb, before_mb = map(float, figures)
    return int(count), seconds, peak_mb, before_mb


def flushes(folder: Path, size: int, count: int = 500) -> float:
    """Appends a second of one writer that flushes each record by itself: what the disk does without groups."""
    descriptor = os.open(folder / "plain", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    began = time.perf_counter()
    for _ in range(count):
        os.write(descriptor, b"x" * size)
        os.fdatasync(descriptor)
    os.close(descriptor)
    return count / (time.perf_counter() - began)


async def appends(path: Path, count: int) -> float:
    """Appends a second, each waited for until it is on disk, by 64 writers at a time."""
    journal = Journal(path, IDENTITY)
    writer = GroupWriter(journal)
    calls = iter([an_answer(number) for number in range(count)])

    async def work() -> None:
        for key, answer in calls:
            await writer.append(key, encode_answer(key, answer))

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(WRITERS)))
    took = time.perf_counter() - began
    await writer.close()
    journal.close()
    return count / took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        rate = uvloop.run(appends(folder / "appends.jsonl", 20_000))
        plain = flushes(folder, 3000)
        write_all(folder / "checkpoint.jsonl", args.calls)
        size_mb = (folder / "checkpoint.jsonl").stat().st_size / 2**20
        count, seconds, peak_mb, before_mb = opened(folder / "checkpoint.jsonl")
    assert count == args.calls
    print(
        f"durable appends, {WRITERS} writers: {rate:,.0f}/s ({rate / plain:.1f} times one flush a record); wanted: 5,000/s"
    )
    print(
        f"{count:,} calls ({size_mb:.0f} MiB) ready for resume: {seconds:.2f} s, {peak_mb:.0f} MB resident, of them "
        f"{before_mb:.0f} MB Python itself; wanted: 2 s, 300 MB"
    )
    print("\nOther tools, measured on another day (one run each, ±30%):")
    for tool, figure in OTHERS.items():
        print(f"  {tool:<44} {figure}")
    return 0 if rate >= 5000 and seconds < 2 and peak_mb < 300 else 1


if __name__ == "__main__":
    sys.exit(main())
