"""The system's ssh: its configuration, agent and known hosts are the user's own; nothing is asked, nothing is guessed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from modal_eval.errors import NodeError

CONFIG = "MODAL_EVAL_SSH_CONFIG"
OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "15",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "ClearAllForwardings": "yes",
    "PermitLocalCommand": "no",
    "LogLevel": "ERROR",
}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
"""Of a host or a user: nothing that ssh or a shell could take for anything else."""
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


@dataclass(frozen=True, slots=True)
class Host:
    """Where to go; what is left out is ssh's own configuration's business."""

    name: str
    user: str | None = None
    port: int | None = None

    def __post_init__(self) -> None:
        for word in (self.name, self.user):
            if word is not None and not NAME.fullmatch(word):
                raise NodeError(
                    f"'{word}' is no name of a host or a user; give a name, an address, or a Host of ~/.ssh/config"
                )

    def run(self, script: str, arguments: Sequence[str] = (), *, data: bytes = b"", timeout_s: float = 60) -> str:
        """Run a POSIX shell script there, with `arguments` as `$1`… and `data` on stdin, and return what it printed.

        Its environment has HOME, USER and a plain PATH, whatever the login shell's start-up files set or print. Raises `NodeError`
        in one line: ssh's own fault with the way out, or the script's last words.
        """
        mark = uuid.uuid4().hex
        words = [f"echo {mark}\n{script}", "sh", *arguments]
        clean = f'exec /usr/bin/env -i HOME="$HOME" USER="$USER" LANG=C.UTF-8 PATH={PATH} /bin/sh -c'
        command = [*self.command(), " ".join([clean, *map(shlex.quote, words)])]
        try:
            ran = subprocess.run(command, input=data, capture_output=True, timeout=timeout_s, check=False)
        except FileNotFoundError:
            raise NodeError("there is no `ssh` on this machine; install openssh-client") from None
        except subprocess.TimeoutExpired:
            raise NodeError(
                f"{self.name} did not answer within {timeout_s:g} s; log in there and see what it does"
            ) from None
        errors = ran.stderr.decode(errors="replace")
        _, found, printed = ran.stdout.decode(errors="replace").partition(f"{mark}\n")
        if found and ran.returncode == 0:
            return printed
        if found and ran.returncode != 255:
            last = (errors.strip() or printed.strip() or f"exit code {ran.returncode}").splitlines()[-1]
            raise NodeError(f"{self.name}: {last}")
        raise NodeError(self._why(errors, ran.returncode))

    def command(self) -> list[str]:
        """ssh as far as the host's name."""
        config = os.environ.get(CONFIG)
        options = [word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")]
        return [
            "ssh", "-T", *(["-F", config] if config else []), *options, *(["-p", str(self.port)] if self.port else []),
            *(["-l", self.user] if self.user else []), "--", self.name,
        ]  # fmt: skip

    def _why(self, errors: str, code: int) -> str:
        """What ssh said, and what to do about it."""
        said = [
            ("REMOTE HOST IDENTIFICATION HAS CHANGED", f"{self.name} shows another host key than the known one: it was set up "
             f"anew, or it is another machine. Find out which; then `ssh-keygen -R {self.name}` and add its new key"),
            ("Host key verification failed", f"the host key of {self.name} is not known here; log in once with "
             f"`ssh {self.name}` and compare its fingerprint, or add the key to ~/.ssh/known_hosts"),
            ("Permission denied", f"{self.name} lets nobody in with the keys of this user; `ssh {self.name}` has to work "
             "without a password"),
            ("Could not resolve hostname", f"there is no host called {self.name}; check the name, or add it to ~/.ssh/config"),
            ("Connection refused", f"nothing listens for SSH on {self.name}; check its port and that sshd runs"),
            ("timed out", f"{self.name} cannot be reached; check the network and that the machine is up"),
        ]  # fmt: skip
        for words, meaning in said:
            if words in errors:
                return meaning
        last = (errors.strip() or f"exit code {code}").splitlines()[-1]
        return f"{self.name} ended the session before anything was run ({last}); check the start-up files of its login shell"
