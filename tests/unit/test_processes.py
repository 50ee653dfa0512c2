import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from modal_eval.processes import OwnedProcess, is_alive, kill_group, last_lines, masked, start_ticks

FOREVER = [sys.executable, "-c", "import time; time.sleep(600)"]
GRANDCHILD = textwrap.dedent("""
    import subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    print(child.pid, flush=True)
    time.sleep(600)
""")
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
)


def gone(pid, within=10.0):
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if start_ticks(pid) == 0:
            return True
        time.sleep(0.02)
    return False


def owner_of(command, tmp_path, grace_s=0.2):
    """A process that owns `command` and reports its pid and its guardian's."""
    script = textwrap.dedent(f"""
        import sys, psutil
        from modal_eval.processes import OwnedProcess
        owned = OwnedProcess.start({command!r}, stdout_pipe=True, grace_s={grace_s})
        first = owned.stdout.readline().decode().strip() if {command[-1] == GRANDCHILD} else "0"
        print(owned.pid, psutil.Process(owned.pid).ppid(), first, flush=True)
        sys.stdin.read()
    """)
    owner = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return owner, [int(word) for word in owner.stdout.readline().split()]


def end(owner):
    owner.kill()
    owner.communicate()


def test_kill_9_of_the_owner_leaves_neither_command_nor_guardian(tmp_path):
    owner, (command, guardian, _) = owner_of(FOREVER, tmp_path)
    end(owner)
    assert gone(command)
    assert gone(guardian)


def test_a_grandchild_in_a_session_of_its_own_is_ended_too(tmp_path):
    owner, (command, _, grandchild) = owner_of([sys.executable, "-c", GRANDCHILD], tmp_path)
    assert os.getsid(grandchild) == grandchild
    end(owner)
    assert gone(command)
    assert gone(grandchild)


def test_kill_9_of_the_guardian_takes_the_command_along(tmp_path):
    owner, (command, guardian, _) = owner_of(FOREVER, tmp_path)
    os.kill(guardian, signal.SIGKILL)
    assert gone(command)
    end(owner)


def test_a_command_that_ignores_sigterm_is_killed_after_its_grace():
    owned = OwnedProcess.start([sys.executable, "-c", STUBBORN], stdout_pipe=True, grace_s=0.2)
    owned.stdout.readline()
    assert owned.stop() == -signal.SIGKILL
    assert gone(owned.pid)


def test_an_interrupt_of_the_terminal_does_not_reach_the_command():
    script = textwrap.dedent(f"""
        import signal, sys
        from modal_eval.processes import OwnedProcess
        caught = []
        signal.signal(signal.SIGINT, lambda *_: caught.append(1))
        with OwnedProcess.start({FOREVER!r}, grace_s=0.2) as owned:
            print("started", flush=True)
            while not caught:
                signal.sigtimedwait([], 0.05)
            print(owned.poll(), flush=True)
    """)
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert owner.stdout.readline() == "started\n"
    os.killpg(owner.pid, signal.SIGINT)
    assert owner.communicate(timeout=20)[0] == "None\n"


def test_sigterm_ends_a_command_that_does_not_handle_it():
    owned = OwnedProcess.start(["sleep", "600"], grace_s=20)
    began = time.monotonic()
    assert owned.stop() == -signal.SIGTERM
    assert time.monotonic() - began < 10


def test_a_stop_can_be_given_less_grace_than_the_start_had():
    owned = OwnedProcess.start([sys.executable, "-c", STUBBORN], stdout_pipe=True, grace_s=600)
    owned.stdout.readline()
    assert owned.stop(grace_s=0.1) == -signal.SIGKILL


def test_a_fork_of_the_owner_does_not_keep_the_command_alive():
    script = textwrap.dedent(f"""
        import os, sys, time
        from modal_eval.processes import OwnedProcess
        owned = OwnedProcess.start({FOREVER!r}, grace_s=0.2)
        fork = os.fork()
        if fork == 0:
            time.sleep(600)
        print(owned.pid, fork, flush=True)
        sys.stdin.read()
    """)
    owner = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    command, fork = (int(word) for word in owner.stdout.readline().split())
    try:
        owner.kill()
        assert gone(command)
        assert start_ticks(fork)
    finally:
        os.kill(fork, signal.SIGKILL)
        owner.communicate()


def test_orphans_are_buried_while_the_command_runs(tmp_path):
    script = "import subprocess, time; subprocess.run(['sh', '-c', 'sleep 0.1 & echo $!']); time.sleep(600)"
    with OwnedProcess.start([sys.executable, "-c", script], stdout_pipe=True, grace_s=0.2) as owned:
        orphan = int(owned.stdout.readline())
        deadline = time.monotonic() + 20
        while psutil.pid_exists(orphan) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not psutil.pid_exists(orphan)
        assert owned.poll() is None


def test_the_exit_code_comes_back(tmp_path):
    for code in (0, 7):
        assert OwnedProcess.start([sys.executable, "-c", f"raise SystemExit({code})"]).wait(20) == code
    assert OwnedProcess.start([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]).wait(20) == -9


def test_stopping_twice_is_stopping_once():
    owned = OwnedProcess.start(FOREVER, grace_s=0.2)
    assert owned.stop() == owned.stop()


def test_words_go_through_the_pipes_and_the_rest_into_the_log(tmp_path):
    script = "import sys; print('heard', sys.stdin.readline().strip()); print('aside', file=sys.stderr)"
    owned = OwnedProcess.start(
        [sys.executable, "-c", script], log_path=tmp_path / "log", stdin_pipe=True, stdout_pipe=True
    )
    owned.stdin.write(b"hello\n")
    owned.stdin.flush()
    assert owned.stdout.read() == b"heard hello\n"
    assert owned.wait(20) == 0
    assert last_lines(tmp_path / "log") == "aside"


def test_a_command_that_does_not_exist_is_named():
    with pytest.raises(FileNotFoundError, match="no-such-program cannot be started"):
        OwnedProcess.start(["no-such-program"])


def test_a_pid_that_was_given_to_another_process_is_not_taken_for_the_old_one():
    me = os.getpid()
    assert is_alive(me, start_ticks(me))
    assert not is_alive(me, start_ticks(me) - 1)
    assert not kill_group(me, start_ticks(me) - 1)


def test_a_group_is_ended_by_pid_and_start_time():
    with subprocess.Popen(FOREVER, start_new_session=True) as child:
        assert kill_group(child.pid, start_ticks(child.pid), grace_s=5)


def test_members_of_a_group_are_ended_when_its_leader_is_gone_already():
    script = "import subprocess; print(subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL).pid, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], start_new_session=True, text=True, **pipes) as leader:
        member = int(leader.stdout.readline())
        started = start_ticks(leader.pid)
        leader.kill()
    assert start_ticks(member)
    assert kill_group(leader.pid, started, grace_s=5)
    assert gone(member)
    assert not kill_group(leader.pid, started)


def test_nothing_of_this_process_is_left_open(tmp_path):
    before = psutil.Process().num_fds()
    for _ in range(3):
        OwnedProcess.start([sys.executable, "-c", ""]).wait(20)
    assert psutil.Process().num_fds() == before


def test_keys_are_masked_in_logs():
    shown = masked(["vllm", "--api-key", "sk-1", "--hf-token=hf_2", "--port", "1", "API_KEY=x"])
    assert shown == "vllm --api-key *** --hf-token=*** --port 1 API_KEY=***"
