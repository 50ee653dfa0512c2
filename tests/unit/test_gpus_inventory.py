from pathlib import Path

import pytest

from modal_eval.errors import GpuError
from modal_eval.gpus import inventory, nvml, visible
from modal_eval.gpus.records import FREE_MIB, Gpu
from modal_eval.gpus.rule import PATIENCE_S
from modal_eval.gpus.zombies import IDLE_S
from tests.support import gpus_machine

pytestmark = pytest.mark.usefixtures("this_machine")


def ways(machine, way):
    if way == "nvidia-smi":
        machine.set("no-nvml")


BOTH = pytest.mark.parametrize("way", ["nvml", "nvidia-smi"])


@BOTH
def test_every_gpu_is_listed_with_its_memory_and_use(machine, process, way):
    ways(machine, way)
    gpus_machine.use(3, process.pid, 40_000, 55)
    found = inventory()
    assert [gpu.index for gpu in found] == list(range(8))
    assert found[0] == Gpu(0, gpus_machine.uuid(0), gpus_machine.NAME, 81_920, 5, 0)
    assert (found[3].used_mib, found[3].utilization) == (40_005, 55)
    assert [gpu.quiet for gpu in found] == [index != 3 for index in range(8)]


@BOTH
def test_a_process_is_listed_with_its_user_command_and_start(machine, process, way):
    ways(machine, way)
    gpus_machine.use(3, process.pid, 40_000)
    (one,) = inventory()[3].processes
    assert (one.pid, one.used_mib, one.name) == (process.pid, 40_000, "sleep 600")
    assert one.user is not None
    assert one.started_at.startswith("20")


@BOTH
def test_values_that_the_driver_does_not_tell_are_none_and_processes_still_count(machine, process, way):
    ways(machine, way)
    machine.set("na")
    gpus_machine.use(3, process.pid)
    found = inventory()
    assert (found[0].total_mib, found[0].used_mib, found[0].utilization) == (None, None, None)
    assert found[3].processes[0].used_mib is None
    assert [gpu.quiet for gpu in found] == [index != 3 for index in range(8)]


@BOTH
def test_a_gpu_cut_up_by_mig_is_listed_and_never_free(machine, way):
    ways(machine, way)
    machine.set("mig", "2")
    assert [gpu.index for gpu in inventory() if not gpu.quiet] == [2]


@BOTH
def test_memory_of_a_process_that_cannot_be_seen_makes_a_gpu_used(machine, way):
    ways(machine, way)
    gpus_machine.use(1, 0, 500)
    found = inventory()[1]
    assert found.processes == ()
    assert not found.quiet


def test_the_drivers_own_memory_leaves_a_gpu_free_and_a_cuda_context_does_not():
    assert Gpu(0, "GPU-0", "A100", 81_920, FREE_MIB, 0).quiet
    assert not Gpu(0, "GPU-0", "A100", 81_920, 200, 0).quiet


def test_a_machine_without_driver_and_command_has_no_gpu(machine, monkeypatch, tmp_path):
    machine.set("no-nvml")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert inventory() == []


@BOTH
def test_a_driver_without_a_gpu_lists_none(machine, way):
    ways(machine, way)
    machine.set("count", "0")
    assert inventory() == []


def test_a_driver_that_fails_is_no_machine_without_gpus(machine):
    machine.set("no-nvml")
    machine.set("fails")
    with pytest.raises(GpuError, match="couldn't communicate with the NVIDIA driver"):
        inventory()


def test_a_library_that_does_not_fit_its_driver_is_named_where_there_is_no_command(machine, monkeypatch, tmp_path):
    machine.set("silent-nvml")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GpuError, match="Driver/library version mismatch"):
        inventory()


def test_the_real_library_says_that_it_is_missing_or_lists_real_gpus():
    """nvidia-ml-py itself: without a driver it raises what we expect, with one it answers what we read."""
    try:
        told = [gpu.uuid.startswith("GPU-") and (gpu.total_mib or 1) > 0 for gpu in nvml.read()]
    except nvml.NoNvml as silent:
        told = [silent.no_driver]
    assert all(told)


@pytest.mark.parametrize(
    ("devices", "indices"),
    [
        (None, list(range(8))),
        ("2,0", [2, 0]),
        ("", []),
        ("1,-1,3", [1]),
        ("1,9,3", [1]),
        ("1,1", [1]),
        ("GPU-00000005", [5]),
        ("GPU-0000000", []),
        ("MIG-5a1b", []),
        (" 4 , 6", [4, 6]),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(devices, indices, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    there = [Gpu(index, gpus_machine.uuid(index), "A100", 81_920, 5, 0) for index in range(8)]
    assert [gpu.index for gpu in visible(there)] == indices


def test_a_gpu_is_free_again_once_its_process_has_ended(machine, process):
    gpus_machine.use(0, process.pid)
    assert not inventory()[0].quiet
    process.kill()
    process.wait()
    assert inventory()[0].quiet


def test_the_page_about_gpus_has_the_limits_that_the_code_has():
    page = (Path(__file__).parents[2] / "docs" / "gpus.md").read_text()
    assert f"no more than {FREE_MIB} MiB" in page
    assert (PATIENCE_S, "After ten minutes of" in page) == (600.0, True)
    assert (IDLE_S, "did nothing for ten\nseconds" in page) == (10.0, True)
    assert all(f"| `{state}` |" in page for state in ("free", "leased", "used", "zombie", "mig"))
