"""A machine with eight GPUs of which only the driver is a stand-in: locks, queues and processes are real."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

from modal_eval.gpus import Folder, nvml
from modal_eval.gpus.folder import is_locked
from modal_eval.gpus.queue import waiters
from tests.support import gpus_machine

SUPPORT = Path(__file__).parent


class Machine:
    """Files of one machine below `folder`; `variables` make a process see it, by NVML and by `nvidia-smi`."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "gpus"
        self.leases = Folder(folder / "leases")
        python, programs = folder / "python", folder / "bin"
        for made in (self.state, python, programs):
            made.mkdir(exist_ok=True)
        shutil.copy(SUPPORT / "gpus_machine.py", python / "gpus_machine.py")
        shutil.copy(SUPPORT / "gpus_pynvml.py", python / "pynvml.py")
        command = programs / "nvidia-smi"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{python / "gpus_machine.py"}" "$@"\n')
        command.chmod(0o755)
        self.python = python
        self.variables = {
            gpus_machine.VARIABLE: str(self.state),
            "MODAL_EVAL_GPU_DIR": str(self.leases.path),
            "PYTHONPATH": str(python),
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        }

    def env(self, env: Mapping[str, str]) -> dict[str, str]:
        without = {name: value for name, value in env.items() if name != "CUDA_VISIBLE_DEVICES"}
        return {**without, **self.variables}

    def pynvml(self, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        """The stand-in for nvidia-ml-py as a module of this process, which may have the real one loaded."""
        monkeypatch.syspath_prepend(self.python)
        monkeypatch.delitem(sys.modules, "gpus_machine", raising=False)
        spec = importlib.util.spec_from_file_location("gpus_pynvml", self.python / "pynvml.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def enter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let this process see the stand-in's GPUs, by NVML and by `nvidia-smi`."""
        for name, value in self.variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(nvml, "pynvml", self.pynvml(monkeypatch))

    def set(self, what: str, text: str = "") -> None:
        """Make the machine `mig`, `fails`, `no-nvml`, `silent-nvml` or `na`, or give it a `count`."""
        (self.state / what).write_text(text)

    def leased(self) -> list[int]:
        """Numbers of the GPUs whose lease file is locked, by whomever."""
        if not self.leases.path.exists():
            return []
        with self.leases.locked():
            paths = (self.leases.lease_path(gpus_machine.uuid(index)) for index in range(gpus_machine.COUNT))
            return [index for index, path in enumerate(paths) if is_locked(path)]

    def waiting(self) -> int:
        with self.leases.locked():
            return len(waiters(self.leases))


def sleeper(env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A process of no consequence, to be killed by whoever asked for it."""
    return subprocess.Popen(["sleep", "600"], env=None if env is None else dict(env))
