"""The sandbox that a benchmark asks for by name."""

from __future__ import annotations

from collections.abc import Sequence

from modal_eval.errors import SandboxError
from modal_eval.scoring.modal_sandbox import ModalSandbox, Pool
from modal_eval.scoring.sandbox import Sandbox

MEANINGS = {
    "local": "bubblewrap on this machine",
    "modal": "Modal Sandboxes",
    "process": "limits without walls, for code that you trust",
}


def make_sandbox(backend: str, local: Sandbox | None = None, packages: Sequence[str] = ()) -> Sandbox:
    """The sandbox named `backend`. Raises `SandboxError` where there is none of that name.

    `local` gives the interpreter and packages of one on this machine, `packages` what Modal's image has to install for the
    same code, in full: pinned, with all that they need.
    """
    if backend == "modal":
        return ModalSandbox(pool=Pool(packages=tuple(packages)))
    local = local or Sandbox()
    if backend == "local":
        return Sandbox("local", local.python, local.mounts, local.site)
    if backend == "process":
        return Sandbox("process", local.python, local.mounts, local.site)
    known = ", ".join(f"{name!r} ({meaning})" for name, meaning in MEANINGS.items())
    raise SandboxError(f"sandbox_backend={backend!r} does not exist; there are {known}")
