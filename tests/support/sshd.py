"""A real OpenSSH server on loopback that lets the test's own user in, and takes them to a home of its own."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from modal_eval.processes import OwnedProcess, free_port

NOISE = "Welcome! You have mail."
START_TIMEOUT_S = 60.0


@dataclass
class SshServer:
    """One node, as its neighbours see it."""

    folder: Path
    port: int
    config: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    def trust(self, public_key: str) -> None:
        """Make `public_key` the one that this machine knows the node by."""
        kind, key = public_key.split()[:2]
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")


def make_key(path: Path) -> str:
    """A fresh key pair; returns the public half."""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True, stdin=subprocess.DEVNULL
    )
    return path.with_name(f"{path.name}.pub").read_text()


@contextlib.contextmanager
def ssh_server(folder: Path) -> Iterator[SshServer]:
    """The server, called `node-a` in its ssh configuration. What was started through it is the test's to end."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None:
        pytest.skip("OpenSSH's server is not installed (Debian: apt-get install openssh-server)")
    folder.mkdir(parents=True)
    server = SshServer(folder, free_port(), folder / "ssh_config")
    server.home.mkdir()
    host_key = make_key(folder / "host_key")
    (folder / "authorized_keys").write_text(make_key(folder / "user_key"))
    login = folder / "login"
    login.write_text(f'export HOME="{server.home}"\necho "{NOISE}"\nexec /bin/sh -c "$SSH_ORIGINAL_COMMAND"\n')
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{server.port}\nHostKey {folder}/host_key\nPidFile none\nStrictModes no\nUsePAM no\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPermitRootLogin yes\nPasswordAuthentication no\n"
        f"KbdInteractiveAuthentication no\nForceCommand /bin/sh {login}\n"
    )
    server.config.write_text(
        f"Host node-a\n  HostName 127.0.0.1\n  Port {server.port}\n  User {pwd.getpwuid(os.geteuid()).pw_name}\n"
        f"  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n  UserKnownHostsFile {server.known_hosts}\n"
        f"  GlobalKnownHostsFile /dev/null\n"
    )
    server.trust(host_key)
    command = [sshd, "-D", "-e", "-f", str(folder / "sshd_config")]
    with OwnedProcess.start(command, log_path=folder / "sshd.log") as process:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert process.poll() is None, (folder / "sshd.log").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), 5):
                break
            time.sleep(0.05)
        yield server
