import json
import os
import stat
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from modal_eval import gpus
from modal_eval.errors import GpuError
from modal_eval.gpus import lease as lease_module
from modal_eval.gpus.folder import Folder, is_locked, lock_now, open_shared, read_text, write_text
from modal_eval.gpus.queue import SILENT_S, Ticket, waiters
from modal_eval.gpus.records import Holder
from modal_eval.gpus.zombies import end_ours
from modal_eval.processes import start_ticks
from tests.support import gpus_machine
from tests.support.gpus import sleeper

pytestmark = pytest.mark.usefixtures("this_machine")


def test_a_lease_holds_its_gpus_until_it_is_released(machine):
    with gpus.take(3, run="one") as lease:
        assert lease.indices == (0, 1, 2)
        assert lease.uuids == tuple(map(gpus_machine.uuid, range(3)))
        assert machine.leased() == [0, 1, 2]
        assert gpus.try_take(6, run="two") is None
    assert lease.indices == ()
    assert machine.leased() == []
    lease.release()


def test_a_request_takes_all_of_its_gpus_or_none(machine):
    with gpus.take(5, run="one"):
        assert gpus.try_take(5, run="two") is None
        assert machine.leased() == [0, 1, 2, 3, 4]
    assert machine.waiting() == 0


def test_what_a_server_needs_to_see_its_gpus_is_in_its_variables(machine):
    with gpus.take(2, run="one", up_to=2) as lease:
        assert lease.variables["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert lease.variables["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        assert str(machine.leases.path) in lease.variables[lease_module.MARK_VARIABLE]


def test_gpus_that_somebody_uses_are_never_taken(machine, process):
    gpus_machine.use(0, process.pid, 300)
    gpus_machine.use(2, 0, 300)  # in another container: memory, but no process
    machine.set("mig", "4")
    with gpus.take(5, run="one") as lease:
        assert lease.indices == (1, 3, 5, 6, 7)


def test_visible_devices_limit_what_is_taken(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,5")
    with gpus.take(1, run="one") as first, gpus.take(1, run="two") as second:
        assert {*first.indices, *second.indices} == {5, 6}
        assert gpus.try_take(1, run="three") is None
    with pytest.raises(GpuError, match="3 GPUs are wanted, and this process may use 2 .* CUDA_VISIBLE_DEVICES=6,5"):
        gpus.take(3, run="four")


def test_more_gpus_than_the_machine_has_are_refused_at_once(machine):
    with pytest.raises(GpuError, match="9 GPUs are wanted, and this process may use 8"):
        gpus.take(9, run="one")


def test_a_machine_without_a_gpu_says_what_to_do_instead(machine):
    machine.set("count", "0")
    with pytest.raises(GpuError, match="no NVIDIA GPU; use infra.target=modal"):
        gpus.take(1, run="one")


def test_a_wait_that_ends_says_who_holds_what(machine, process):
    gpus_machine.use(7, process.pid)
    heard = []
    with gpus.take(7, run="nightly", what="vLLM of a model"), pytest.raises(GpuError) as refused:
        gpus.take(1, run="two", timeout=0.1, on_wait=heard.append)
    assert "no GPU after 0.1 s" in str(refused.value)
    (said,) = heard
    assert f"GPU 0: nightly for vLLM of a model ({gpus.inventory()[7].processes[0].user}, pid {os.getpid()}" in said
    assert "GPU 7: used by" in said
    assert f"pid {process.pid}, sleep 600" in said
    assert machine.waiting() == 0


def test_further_gpus_are_taken_in_multiples_where_nobody_waits(machine):
    with gpus.take(1, run="small"):
        with gpus.take(2, run="one", up_to=8) as lease:
            assert lease.indices == (1, 2, 3, 4, 5, 6)
        with machine.leases.locked():
            other = Ticket(machine.leases, Holder.me("x", "big", ""), 8, map(gpus_machine.uuid, range(8)))
        with gpus.take(2, run="one", up_to=8) as lease:
            assert len(lease.indices) == 2
        other.leave()


def test_an_older_request_comes_first_though_it_has_not_asked_again_yet(machine):
    with machine.leases.locked():
        older = Ticket(machine.leases, Holder.me("x", "older", ""), 8, map(gpus_machine.uuid, range(8)))
    assert gpus.try_take(1, run="younger") is None
    older.leave()
    with gpus.take(1, run="younger", timeout=0) as lease:
        assert lease.indices == (0,)


def test_a_waiter_that_has_fallen_silent_is_passed_over(machine):
    with machine.leases.locked():
        silent = Ticket(machine.leases, Holder.me("x", "silent", ""), 8, map(gpus_machine.uuid, range(8)))
        path = next(machine.leases.queue.glob("*.ticket"))
        path.write_text(json.dumps({**json.loads(path.read_text()), "asked": time.monotonic() - SILENT_S - 1}))
    with gpus.take(1, run="younger", timeout=0) as lease:
        assert lease.indices == (0,)
        silent.ask()
        with machine.leases.locked():
            assert [one.holder.run for one in waiters(machine.leases)] == ["silent"]
    silent.leave()


def test_a_lease_is_divided_among_replicas_that_give_back_each_its_own(machine):
    lease = gpus.take(4, run="one")
    first, second = lease.split(2)
    assert (first.indices, second.indices, lease.indices) == ((0, 1), (2, 3), ())
    first.release()
    assert machine.leased() == [2, 3]
    with pytest.raises(ValueError, match="2 GPUs cannot be divided into parts of 3"):
        second.split(3)
    second.release()
    assert machine.leased() == []


def test_a_gpu_stays_taken_while_a_server_has_its_descriptor(machine):
    with gpus.take(1, run="one") as lease:
        server = subprocess.Popen(["sleep", "600"], pass_fds=lease.fds)
    try:
        assert machine.leased() == [0]
    finally:
        server.kill()
        server.wait()
    assert machine.leased() == []


def marked(lease, owner):
    """A server of `lease` that claims to be started by `owner`."""
    folder, lease_id, _, _ = lease.variables[lease_module.MARK_VARIABLE].split(":")
    return sleeper({**os.environ, lease_module.MARK_VARIABLE: f"{folder}:{lease_id}:{owner}"})


def test_a_server_is_ended_only_when_the_holder_of_its_lease_is_dead(machine, process):
    with gpus.take(1, run="one") as lease:
        text = read_text(machine.leases.lease_path(lease.uuids[0]))
        write_text(lease.fds[0], {**text, "pid": process.pid, "started": start_ticks(process.pid)})
        server = marked(lease, owner="1:1")
        assert end_ours(machine.leases) == []
        process.kill()
        process.wait()
        assert end_ours(machine.leases) == [server.pid]
    assert server.wait() != 0


def test_a_server_whose_lease_was_given_back_by_a_live_run_is_the_runs_to_end(machine):
    with gpus.take(1, run="one") as lease:
        server = marked(lease, owner=f"{os.getpid()}:{start_ticks(os.getpid()):.0f}")
    with gpus.take(1, run="two"):
        assert server.poll() is None
    server.kill()
    server.wait()


def test_a_lease_file_that_was_cut_off_still_says_that_it_is_taken(machine):
    with gpus.take(1, run="one"):
        machine.leases.lease_path(gpus_machine.uuid(0)).write_text('{"run": "on')
        assert machine.leases.holder(gpus_machine.uuid(0)) is None
        with gpus.take(8 - 1, run="two") as rest:
            assert 0 not in rest.indices


def test_a_lease_file_that_was_removed_is_made_anew(tmp_path):
    path = tmp_path / "x.lease"
    first = lock_now(path)
    path.unlink()
    assert not is_locked(path)
    second = lock_now(path)
    assert second is not None
    assert is_locked(path)
    os.close(first)
    assert is_locked(path)
    os.close(second)


def test_the_folder_is_open_to_every_user_whatever_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        folder = Folder(tmp_path / "leases")
        with folder.locked():
            os.close(lock_now(folder.lease_path("GPU-1")))
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o1777
    assert stat.S_IMODE(folder.queue.stat().st_mode) == 0o1777
    assert stat.S_IMODE(folder.lease_path("GPU-1").stat().st_mode) == 0o666


def test_a_link_in_place_of_the_folder_or_of_a_lease_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(GpuError, match="is no folder"):
        Folder(tmp_path / "link").make()
    (tmp_path / "x.lease").symlink_to(tmp_path / "elsewhere" / "victim")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        open_shared(tmp_path / "x.lease")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as two users")
def test_two_users_of_a_machine_see_each_others_locks():
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        folder = Folder(Path(made) / "leases")
        with folder.locked():
            held, free = lock_now(folder.lease_path("GPU-1")), lock_now(folder.lease_path("GPU-2"))
            os.close(free)
        other = os.fork()
        if other == 0:
            os.setuid(65_534)
            try:
                with folder.locked():
                    good = (
                        lock_now(folder.lease_path("GPU-1")) is None
                        and lock_now(folder.lease_path("GPU-2")) is not None
                    )
            except BaseException:  # noqa: BLE001 - the exit code is all that the parent sees
                good = False
            os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0
        os.close(held)


def test_a_folder_that_somebody_keeps_locked_is_named_with_the_culprit(tmp_path, monkeypatch):
    monkeypatch.setattr("modal_eval.gpus.folder.LOCK_TIMEOUT_S", 0.05)
    folder = Folder(tmp_path / "leases")
    with folder.locked(), pytest.raises(GpuError, match=f"pid {os.getpid()} has kept"), folder.locked():
        pass


def test_the_driver_is_not_asked_while_the_leases_leave_too_little(machine):
    machine.set("no-nvml")
    with gpus.take(8, run="one"):
        (machine.state / "asked").write_text("")
        with pytest.raises(GpuError):
            gpus.take(1, run="two", timeout=1.2)
        assert len((machine.state / "asked").read_text().splitlines()) <= 2  # what there is at all, and by whom used


def test_the_default_folder_is_the_same_for_every_user(monkeypatch):
    monkeypatch.delenv("MODAL_EVAL_GPU_DIR", raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    assert Folder().path in (Path("/run/lock/modal-eval-gpus"), Path("/tmp/modal-eval-gpus"))
