"""What the proxy costs: calls a second and added latency, against going direct in the same run.

    python benchmarks/proxy.py

The proxy has one core to itself, client and stub share another one. Every call is a different one, so each is written
to the journal and flushed before the client sees its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import uvloop

from modal_eval.proxy import Proxy, ProxySettings

STUB = Path(__file__).with_name("stub.py")
ROUNDS = 3
PROMPT = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. " * 15

OTHERS = {
    "lm-eval's client, 64 concurrent, no journal": "1,400 to 1,615 requests/s",
    "NeMo Evaluator 0.3, one fsync a record": "86 calls/s",
    "inspect_ai, instant stub": "60 samples/s; 28/s at 100 ms latency",
}


@dataclass
class Measured:
    rate: float
    p50_ms: float
    cpu_us: float = 0.0
    """CPU time of the proxy per call: what a busy machine cannot distort."""


@contextlib.contextmanager
def stub(latency: float) -> Iterator[str]:
    command = [sys.executable, str(STUB), f"--latency={latency}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield f"http://127.0.0.1:{json.loads(process.stdout.readline())['port']}/v1"
        process.stdin.close()


@contextlib.contextmanager
def proxy(base_url: str, core: int | None, in_flight: int) -> Iterator[Proxy]:
    ours = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = ProxySettings(
            journal=folder / "checkpoint.jsonl", identity={"benchmark": "proxy"}, upstreams=(base_url,), model="stub",
            api_key_env=None, max_in_flight=in_flight, call_timeout_s=60, retries=3, log_path=folder / "proxy.log",
        )  # fmt: skip
        if core is not None:
            os.sched_setaffinity(0, {core})  # inherited by the proxy
        try:
            running = Proxy.start(settings)
        finally:
            os.sched_setaffinity(0, ours)
        try:
            yield running
        finally:
            running.stop()


async def load(base_url: str, name: str, *, calls: int, in_flight: int) -> Measured:
    """So many different calls, so many at a time."""
    times: list[float] = []
    numbers = iter(range(calls))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def work() -> None:
            for number in numbers:
                body = {
                    "model": "stub",
                    "messages": [{"role": "user", "content": f"{name} {number}: {PROMPT}"}],
                    "max_tokens": 512,
                }
                began = time.perf_counter()
                async with session.post(f"{base_url}/chat/completions", json=body) as response:
                    await response.read()
                    assert response.status == 200, await response.text()
                times.append(time.perf_counter() - began)

        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(in_flight)))
        took = time.perf_counter() - began
    return Measured(calls / took, sorted(times)[len(times) // 2] * 1000)


def cpu_s(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def compare(latency: float, *, calls: int, in_flight: int, core: int | None) -> tuple[Measured, Measured]:
    """Direct and through the proxy in turns, the best of three each: what else runs here can only make it slower."""
    with stub(latency) as base_url, proxy(base_url, core, in_flight) as running:
        best: dict[str, Measured] = {}
        for attempt in range(ROUNDS):
            for url in (base_url, running.base_url):
                uvloop.run(load(url, f"warm-up {attempt}", calls=in_flight * 4, in_flight=in_flight))
                before = cpu_s(running.pid)
                measured = uvloop.run(load(url, f"measured {attempt}", calls=calls, in_flight=in_flight))
                measured.cpu_us = (cpu_s(running.pid) - before) / calls * 1e6
                best[url] = max(measured, best.get(url, measured), key=lambda each: each.rate)
        assert running.stats()["replayed"] == 0
        return best[base_url], best[running.base_url]


def main() -> int:
    cores = sorted(os.sched_getaffinity(0))
    core = cores[0] if len(cores) > 1 else None
    if core is not None:
        os.sched_setaffinity(0, {cores[1]})
    failed = []

    def say(name: str, figure: str, *, holds: bool) -> None:
        print(f"{name:<44} {figure}{'' if holds else '   MISSED'}")
        if not holds:
            failed.append(name)

    direct, ours = compare(0.0, calls=6000, in_flight=64, core=core)
    say(
        "64 in flight, instant server",
        f"{ours.rate:,.0f} calls/s ({ours.rate / direct.rate:.0%} of direct, {direct.rate:,.0f}/s), {ours.cpu_us:.0f} µs of CPU each; wanted: 600",
        holds=ours.rate >= 600,
    )
    direct, ours = compare(0.1, calls=6400, in_flight=64, core=core)
    ideal = 64 / 0.1
    say(
        "64 in flight, 100 ms latency",
        f"{ours.rate:,.0f} calls/s ({ours.rate / ideal:.1%} of ideal, direct {direct.rate / ideal:.1%}); wanted: 95%",
        holds=ours.rate >= 0.95 * ideal,
    )
    direct, ours = compare(0.02, calls=2000, in_flight=8, core=core)
    say(
        "8 in flight, added latency (p50)",
        f"{ours.p50_ms - direct.p50_ms:.2f} ms ({ours.p50_ms:.2f} against {direct.p50_ms:.2f} direct); wanted: < 5",
        holds=ours.p50_ms - direct.p50_ms < 5,
    )
    print("\nOther tools, measured against a stub on another day (one run each, ±30%):")
    for tool, figure in OTHERS.items():
        print(f"  {tool:<42} {figure}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
