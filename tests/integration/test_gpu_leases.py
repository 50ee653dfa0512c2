"""Leases of GPUs between real processes; only the driver is a stand-in."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modal_eval.gpus import survey
from modal_eval.gpus.lease import MARK_VARIABLE
from modal_eval.processes import start_ticks
from tests.support import gpus_machine
from tests.support.gpus import sleeper
from tests.support.processes import until

ROOT = Path(__file__).resolve().parents[2]
SERVER = ROOT / "tests" / "support" / "gpus_server.py"


@pytest.fixture(autouse=True)
def nothing_is_left(mark):
    """A test that fails half-way leaves no process behind either."""
    yield
    left = mark.wait_until_gone()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == {}


@pytest.fixture
def audit(tmp_path):
    """The auditor's folder: no server has ever found another one on its GPU."""
    folder = tmp_path / "audit"
    folder.mkdir()
    yield folder
    assert list(folder.glob("violation-*")) == []


def python(machine, mark, script, **more):
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**machine.env(mark.env), **more},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def hold(machine, mark, count, then="import time; time.sleep(600)", **more):
    """A process that has taken `count` GPUs."""
    script = f"from modal_eval import gpus\nlease = gpus.take({count}, run='held')\nprint(*lease.indices, flush=True)\n{then}"
    holder = python(machine, mark, script, **more)
    indices = [int(word) for word in holder.stdout.readline().split()]
    assert len(indices) == count
    return holder, indices


def end(process):
    process.kill()
    process.communicate()


def command(machine, mark, *arguments, expect=0):
    ran = subprocess.run(
        [sys.executable, "-m", "modal_eval.cli", "gpus", *arguments],
        env={**machine.env(mark.env), "COLUMNS": "400"}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == expect, ran.stderr
    return ran


class Crowd:
    """Four clients with their jobs, each begun anew when it was killed."""

    def __init__(self, machine, mark, folder, audit, shares):
        self.machine, self.mark, self.audit = machine, mark, audit
        self.folders = []
        for number, jobs in enumerate(shares):
            self.folders.append(folder / f"client{number}")
            self.folders[-1].mkdir()
            for at, job in enumerate(jobs):
                (self.folders[-1] / f"job{at}.json").write_text(json.dumps(job))
        self.clients = [self.start(one) for one in self.folders]

    def start(self, folder):
        words = ["-m", "tests.support.gpus_client", str(folder), str(self.audit), "600"]
        with (self.audit / f"{folder.name}.stderr").open("ab") as talk:
            return subprocess.Popen(
                [sys.executable, *words], env=self.machine.env(self.mark.env), cwd=ROOT, stderr=talk
            )

    def done(self):
        return [json.loads(path.read_text()) for folder in self.folders for path in folder.glob("*.done")]

    def kill_somebody(self, chance):
        """`kill -9` of a client, of a guardian, or of a server."""
        kind = chance.choice(["gpus_client", "gpus_client", "guardian.py", "gpus_server.py"])
        pids = [
            pid
            for pid, line in self.mark.processes().items()
            if kind in line and (kind == "guardian.py" or "guardian.py" not in line)
        ]
        if pids:
            os.kill(chance.choice(pids), signal.SIGKILL)
        return bool(pids)

    def revive(self):
        for number, client in enumerate(self.clients):
            if client.poll() not in (None, 0):
                self.clients[number] = self.start(self.folders[number])


def test_thirty_jobs_of_four_processes_never_share_a_gpu_though_they_are_killed_at_random(
    machine, mark, tmp_path, audit
):
    chance = random.Random(4)
    sizes = [8, 4, 4, 2, 2, 2] + [1] * 24
    chance.shuffle(sizes)
    jobs = [{"count": size, "hold_s": chance.uniform(0.1, 0.8)} for size in sizes]
    crowd = Crowd(machine, mark, tmp_path, audit, [jobs[at::4] for at in range(4)])
    killed, next_kill = 0, time.monotonic() + 2.0
    deadline = time.monotonic() + 120
    while any(client.poll() != 0 for client in crowd.clients):
        assert time.monotonic() < deadline, f"{len(crowd.done())} of {len(jobs)} were served"
        if killed < 12 and time.monotonic() > next_kill:
            killed += crowd.kill_somebody(chance)
            next_kill = time.monotonic() + 0.5
        crowd.revive()
        time.sleep(0.05)
    assert killed >= 6
    assert "".join(path.read_text() for path in audit.glob("*.stderr")) == ""
    assert sorted(job["gpus"] for job in crowd.done()) == sorted(sizes)
    assert mark.wait_until_gone() == {}
    assert machine.leased() == []
    assert machine.waiting() == 0


SERVE = f"""
import os, sys, time
from modal_eval.processes import OwnedProcess
command = [sys.executable, {str(SERVER)!r}, sys.argv[1], "0", *sys.argv[2:]]
server = OwnedProcess.start(
    command, env={{**os.environ, **lease.variables}}, hold_fds=lease.fds, stdout_pipe=True, grace_s=0.5
)
for _ in range(1 + sys.argv[2:].count("worker")):  # each writes into a pipe that breaks when this process is killed
    server.stdout.readline()
print(server.pid, flush=True)
time.sleep(600)
"""


def serving(machine, mark, audit, *more):
    """A run that has GPU 0 and a server on it, with the pids of the server and of its guardian."""
    script = f"from modal_eval import gpus\nlease = gpus.take(1, run='nightly', what='a server')\n{SERVE}"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(audit), *more], env=machine.env(mark.env), cwd=ROOT, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    server = int(holder.stdout.readline())
    guardian = next(pid for pid, line in mark.processes().items() if "guardian.py" in line)
    return holder, server, guardian


def test_kill_9_of_a_holder_frees_its_gpus_at_once(machine, mark):
    holder, indices = hold(machine, mark, 3)
    assert machine.leased() == indices == [0, 1, 2]
    end(holder)
    assert machine.leased() == []


def test_a_dead_runs_gpu_stays_taken_until_its_server_has_ended(machine, mark, audit):
    holder, server, guardian = serving(machine, mark, audit)
    os.kill(guardian, signal.SIGSTOP)  # so that it cannot end the server yet
    end(holder)
    assert start_ticks(server)
    assert machine.leased() == [0]
    os.kill(guardian, signal.SIGCONT)
    until(lambda: machine.leased() == [])
    assert not start_ticks(server)


def test_what_a_dead_run_and_its_dead_guardian_left_on_a_gpu_is_ended_on_sight(machine, mark, audit):
    holder, server, guardian = serving(machine, mark, audit, "worker")
    os.kill(guardian, signal.SIGSTOP)  # it shall not act between the two kills
    end(holder)
    os.kill(guardian, signal.SIGKILL)
    until(lambda: not start_ticks(server))
    (worker,) = [pid for pid, line in mark.processes().items() if SERVER.name in line]
    ran = command(machine, mark)
    assert f"Ended leftovers: pid {worker}" in ran.stderr
    assert not start_ticks(worker)
    assert machine.leased() == []
    assert "free" in ran.stdout.splitlines()[1]


def test_the_next_run_ends_such_a_leftover_and_gets_its_gpu(machine, mark, audit):
    holder, server, guardian = serving(machine, mark, audit, "worker")
    os.kill(guardian, signal.SIGSTOP)
    end(holder)
    os.kill(guardian, signal.SIGKILL)
    until(lambda: not start_ticks(server))
    successor, indices = hold(machine, mark, 8)
    assert len(indices) == 8
    end(successor)


def test_a_server_of_a_live_run_is_no_leftover(machine, mark, audit):
    holder, server, _ = serving(machine, mark, audit)
    found = json.loads(command(machine, mark, "--reap", "--json").stdout)
    assert found[0]["state"] == "leased"
    assert found[0]["holder"]["run"] == "nightly"
    assert found[0]["holder"]["pid"] == holder.pid
    assert [one["pid"] for one in found[0]["processes"]] == [server]
    assert start_ticks(server)
    end(holder)


def test_a_leftover_of_another_lease_folder_is_left_alone(machine, mark, tmp_path):
    there = mark.env | {MARK_VARIABLE: f"{tmp_path / 'elsewhere'}:abc:1:1"}
    stranger = sleeper(there)
    command(machine, mark)
    assert start_ticks(stranger.pid)
    end(stranger)


def test_a_waiter_that_is_killed_keeps_nobody_waiting(machine, mark):
    holder, _ = hold(machine, mark, 1)
    big = python(machine, mark, "from modal_eval import gpus\ngpus.take(8, run='big')")
    until(lambda: machine.waiting() == 1)
    assert "Waiting for 8: big" in command(machine, mark).stderr
    end(big)
    assert machine.waiting() == 0
    end(holder)


def test_a_big_request_is_served_though_small_ones_never_cease(machine, mark):
    """Three processes that always have a next small request in the queue, and a patience of half a second."""
    greedy = """
import threading, time
from modal_eval import gpus
from modal_eval.gpus import taking
taking.PATIENCE_S = 0.5
def again():
    while True:
        with gpus.take(2, run="small"):
            time.sleep(0.8)
for _ in range(2):
    threading.Thread(target=again).start()
print("started", flush=True)
"""
    small = [python(machine, mark, greedy) for _ in range(3)]
    for one in small:
        one.stdout.readline()
    until(lambda: len(machine.leased()) == 8)
    asked = time.monotonic()
    patient = "from modal_eval.gpus import taking\ntaking.PATIENCE_S = 0.5"
    script = (
        f"{patient}\nfrom modal_eval import gpus\nlease = gpus.take(8, run='big')\nprint(len(lease.fds), flush=True)"
    )
    big = python(machine, mark, script)
    assert big.stdout.readline() == "8\n"
    assert time.monotonic() - asked < 20
    for one in [big, *small]:
        end(one)


ORPHAN = """
import subprocess, sys
child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
"""


def orphan(mark):
    """A process whose parent and whole session have ended: what a crashed program leaves behind."""
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHAN], env=mark.env, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    return int(parent.communicate()[0])


@pytest.fixture
def on_the_machine(machine, monkeypatch):
    """This process, too, sees the stand-in's GPUs."""
    machine.enter(monkeypatch)
    return machine


def test_an_idle_orphan_is_shown_and_not_ended(on_the_machine, mark):
    left = orphan(mark)
    gpus_machine.use(2, left, 40_000, 0)
    found = survey(idle_s=0.6)
    assert (found.zombies, found.ended) == ({left}, set())
    assert found.state(found.gpus[2]) == "zombie"
    assert start_ticks(left)
    os.kill(left, signal.SIGKILL)


def test_an_idle_orphan_is_ended_on_request(on_the_machine, mark):
    left = orphan(mark)
    gpus_machine.use(2, left, 40_000, 0)
    ran = command(on_the_machine, mark, "--reap", "--json")
    assert f"Ended leftovers: pid {left}" in ran.stderr
    assert json.loads(ran.stdout)[2]["state"] == "free"
    assert not start_ticks(left)


def test_neither_a_busy_orphan_nor_an_idle_child_nor_an_idle_daemon_is_ended(on_the_machine, mark):
    busy = orphan(mark)
    idle_child = sleeper(mark.env)
    daemon = subprocess.Popen(["setsid", "--fork", "sleep", "599"], env=mark.env)
    daemon.wait()
    until(lambda: any(line == "sleep 599" for line in mark.processes().values()))
    (daemons,) = [pid for pid, line in mark.processes().items() if line == "sleep 599"]
    for gpu, (pid, use) in enumerate([(busy, 3), (idle_child.pid, 0), (daemons, 0)]):
        gpus_machine.use(gpu, pid, 40_000, use)
    found = json.loads(command(on_the_machine, mark, "--reap", "--json").stdout)
    assert [gpu["state"] for gpu in found[:4]] == ["used", "used", "used", "free"]
    assert all(start_ticks(pid) for pid in (busy, idle_child.pid, daemons))
    for pid in (busy, daemons):
        os.kill(pid, signal.SIGKILL)
    end(idle_child)


def test_the_table_shows_each_gpu_with_its_memory_use_and_user(on_the_machine, mark):
    user = sleeper(mark.env)
    gpus_machine.use(1, user.pid, 30_000, 41)
    holder, _ = hold(on_the_machine, mark, 1)
    ran = command(on_the_machine, mark)
    lines = ran.stdout.splitlines()
    assert len(lines) == 9
    assert "leased" in lines[1]
    assert "held (" in lines[1]
    assert f"pid {holder.pid}" in lines[1]
    assert "30,005/81,920 MiB" in lines[2]
    assert "41%" in lines[2]
    assert f"pid {user.pid}: sleep 600" in lines[2]
    end(holder)
    end(user)


def test_a_machine_without_gpus_gets_a_sentence_and_no_error(machine, mark):
    machine.set("count", "0")
    ran = command(machine, mark)
    assert "This machine has no NVIDIA GPU." in ran.stderr
    assert ran.stdout == ""
    assert json.loads(command(machine, mark, "--json").stdout) == []


def test_a_driver_that_fails_is_an_error_in_one_line(machine, mark):
    machine.set("no-nvml")
    machine.set("fails")
    ran = command(machine, mark, expect=1)
    assert ran.stderr.startswith("modal-eval: nvidia-smi failed with 9: NVIDIA-SMI has failed")
    assert "Traceback" not in ran.stderr
