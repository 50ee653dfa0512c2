"""A worker as a service of a node: a systemd user unit, or a supervised process where there is no systemd.

Every path is absolute, and nothing depends on a login: not the shell, not its start-up files, not a virtual environment
that somebody activated.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from modal_eval.checkout import revision_of
from modal_eval.errors import NodeError
from modal_eval.nodes.ssh import NAME, Host
from modal_eval.paths import project_root

LONG_S = 900.0
STOP_S = 300.0

INSPECT = r"""
home=$1; python=$2
echo "system=$(uname -s)"
folder=$home; while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
echo "free_kb=$(df -Pk "$folder" | awk 'NR==2 {print $4}')"
[ -d "$home/flows" ] && echo "checkout=yes"
[ -x "$python" ] && echo "version=$("$python" -I -c 'import modal_eval; print(modal_eval.__version__)' 2> /dev/null)"
echo "revision=$(git -C "$home" rev-parse HEAD 2> /dev/null)"
export XDG_RUNTIME_DIR="/run/user/$(id -u)"
systemctl --user show-environment > /dev/null 2>&1 && echo "systemd=yes"
/usr/bin/nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | sed 's/^/gpu=/'
exit 0
"""
CLONE = r"""
set -e
home=$1; revision=$2
mkdir -p "$home"
bundle=$(mktemp)
trap 'rm -f "$bundle"' EXIT
cat > "$bundle"
git init -q "$home"
git -C "$home" fetch -q "$bundle" HEAD
git -C "$home" checkout -q "$revision"
"""
SETUP = r"""
set -e
cd "$1"
make setup > setup.log 2>&1 || { tail -n 1 setup.log >&2; exit 1; }
"""
WRITE = r"""
set -e
umask 077
mkdir -p "$(dirname "$1")"
cat > "$1.new"
mv "$1.new" "$1"
"""
HOME_FOLDER = 'echo "$HOME"'
STAY_AWAY = r"""
stay_away() {
  if crontab -l 2> /dev/null | grep -qF "$1/start"; then
    { crontab -l | grep -vF "$1/start" || true; } | crontab -
  fi
}
"""
"""What the two scripts below that end a supervisor have in common: a reboot does not start it either."""
SYSTEMD_START = r"""
set -e
export XDG_RUNTIME_DIR="/run/user/$(id -u)"
systemctl --user daemon-reload
systemctl --user enable -q "$1"
systemctl --user restart "$1"
loginctl enable-linger "$(id -un)" 2> /dev/null || echo "linger=no"
"""
SYSTEMD_SIGNAL = r"""
export XDG_RUNTIME_DIR="/run/user/$(id -u)"
if_loaded() {
  said=$(systemctl --user "$@" 2>&1) && return 0
  code=$?
  case $said in *"not loaded"*) return 0 ;; esac
  echo "$said" >&2
  return $code
}
systemctl --user disable -q "$1"
case $2 in
  drain) if_loaded kill --kill-whom=main -s USR1 "$1" ;;
  stop) if_loaded stop "$1" ;;
esac
"""
"""A unit that systemd does not know has ended."""
SUPERVISED_START = r"""
set -e
python=$1; supervisor=$2; folder=$3; home=$4; shift 4
cd "$home"
set -a; . "$folder/env"; set +a
"$python" -I "$supervisor" "$folder" -- "$@" < /dev/null > /dev/null 2>&1
if command -v crontab > /dev/null 2>&1; then
  line="@reboot /bin/sh $folder/start"
  { crontab -l 2> /dev/null | grep -vF "$folder/start" || true; echo "$line"; } | crontab -
else
  echo "reboot=no"
fi
"""
SUPERVISED_SIGNAL = r"""
folder=$1
[ "$2" != drain ] || stay_away "$folder" || exit 1
[ -f "$folder/pid" ] || exit 0
read -r pid ticks < "$folder/pid"
alive() {
  stat=$(sed 's/.*) //' "/proc/$pid/stat" 2> /dev/null) || return 1
  [ "$(echo "$stat" | cut -d' ' -f20)" = "$ticks" ] && [ "${stat%% *}" != Z ]
}
case $2 in
  drain) alive && kill -USR1 "$pid" || true ;;
  stop) alive && kill -TERM "$pid" || true; while alive; do sleep 0.2; done ;;
esac
"""
FORGET = r"""
stay_away "$1"
rm -rf "$1"
rm -f "$2"
exit 0
"""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a node has."""

    system: str = ""
    free_bytes: int = 0
    has_checkout: bool = False
    version: str = ""
    """Of modal-eval in the Python that was named; empty where there is none."""
    revision: str = ""
    has_systemd: bool = False
    gpus: tuple[str, ...] = ()


def inspect(host: Host, home: str, python: str) -> Facts:
    """Look at a node once. Raises `NodeError` where nobody can get there."""
    lines = [line.partition("=") for line in host.run(INSPECT, [home, python]).splitlines()]
    found = {key: value.strip() for key, _, value in lines}
    return Facts(
        found.get("system", ""), 1024 * int(found.get("free_kb") or 0), "checkout" in found, found.get("version", ""),
        found.get("revision", ""), "systemd" in found, tuple(value for key, _, value in lines if key == "gpu"),
    )  # fmt: skip


def install_checkout(host: Host, home: str) -> None:
    """Put this checkout's revision there, over the same connection. What is not committed stays here."""
    root = project_root()
    revision = revision_of(root)
    if revision is None:
        raise NodeError(f"{root} is no git repository, so no revision of it can be put on {host.name}")
    bundle = subprocess.run(
        ["git", "-C", str(root), "bundle", "create", "-q", "-", "HEAD"], capture_output=True, check=False
    )
    if bundle.returncode != 0:
        raise NodeError(f"git could not pack this checkout: {bundle.stderr.decode(errors='replace').strip()}")
    host.run(CLONE, [home, revision], data=bundle.stdout, timeout_s=LONG_S)


def install_environment(host: Host, home: str) -> None:
    """Make the checkout's own `.venv` there, as in a fresh clone."""
    host.run(SETUP, [home], timeout_s=LONG_S)


@dataclass(frozen=True, slots=True)
class Service:
    """One worker of a node."""

    host: Host
    name: str
    home: str
    python: str
    arguments: tuple[str, ...]
    """Of `modal-eval worker`."""
    systemd: bool
    user_home: str = field(default="")

    @classmethod
    def of(cls, host: Host, name: str, home: str, python: str, arguments: tuple[str, ...], *, systemd: bool) -> Self:
        if not NAME.fullmatch(name):
            raise NodeError(f"'{name}' is no name for a node; letters, digits, '.', '_' and '-' are allowed")
        return cls(host, name, home, python, arguments, systemd, host.run(HOME_FOLDER).strip())

    @property
    def unit(self) -> str:
        return f"modal-eval-worker-{self.name}.service"

    @property
    def folder(self) -> str:
        """Its environment, its log and its pid."""
        return f"{self.user_home}/.local/state/modal-eval/services/{self.name}"

    @property
    def command(self) -> list[str]:
        return [self.python, "-m", "modal_eval.cli", "worker", *self.arguments]

    def unit_text(self) -> str:
        """`deployments/modal-eval-worker.service`, filled in."""
        text = (project_root() / "deployments" / "modal-eval-worker.service").read_text(encoding="utf-8")
        values = {
            "NAME": self.name, "HOME": self.home, "ENVIRONMENT": f"{self.folder}/env", "COMMAND": shlex.join(self.command),
        }  # fmt: skip
        for key, value in values.items():
            text = text.replace(f"@{key}@", value.replace("%", "%%"))
        return text

    def start(self, environment: Mapping[str, str]) -> list[str]:
        """Write it, start it, or start it anew; returns what a person has to know.

        The environment, which may hold a secret, goes over stdin into a file of mode 0600.
        """
        self._write(f"{self.folder}/env", environment_text(environment))
        if self.systemd:
            self._write(f"{self.user_home}/.config/systemd/user/{self.unit}", self.unit_text())
            said = self.host.run(SYSTEMD_START, [self.unit], timeout_s=STOP_S)
            return (
                ["it ends when its user logs out: `sudo loginctl enable-linger` there"] if "linger=no" in said else []
            )
        self.signal("stop")
        supervisor = f"{self.home}/src/modal_eval/nodes/supervisor.py"
        words = [self.python, supervisor, self.folder, self.home, *self.command]
        start = f"set -- {shlex.join(words)}\n{SUPERVISED_START.partition('if command')[0]}"
        self._write(f"{self.folder}/start", start)
        said = self.host.run(SUPERVISED_START, words)
        return (
            ["after a reboot it has to be added again: there is neither systemd nor cron"]
            if "reboot=no" in said
            else []
        )

    def signal(self, what: str) -> None:
        """`drain`, or `stop` and wait until it has ended."""
        if self.systemd:
            self.host.run(SYSTEMD_SIGNAL, [self.unit, what], timeout_s=STOP_S)
        else:
            self.host.run(STAY_AWAY + SUPERVISED_SIGNAL, [self.folder, what], timeout_s=STOP_S)

    def remove(self) -> None:
        """Stop it and remove its files; the checkout stays."""
        self.signal("stop")
        self.host.run(STAY_AWAY + FORGET, [self.folder, f"{self.user_home}/.config/systemd/user/{self.unit}"])

    def last_words(self) -> str:
        """The end of its log, for a worker that did not come up."""
        script = 'tail -n 3 "$1/log" 2> /dev/null; exit 0'
        if self.systemd:
            script = 'journalctl --user -q -n 3 -o cat -u "$2" 2> /dev/null; exit 0'
        return " ".join(self.host.run(script, [self.folder, self.unit]).split())

    def _write(self, path: str, text: str) -> None:
        self.host.run(WRITE, [path], data=text.encode())


def environment_text(environment: Mapping[str, str]) -> str:
    """Lines that a POSIX shell and systemd read alike. Raises `NodeError` for a value of several lines."""
    lines = []
    for name, value in sorted(environment.items()):
        if "\n" in value or not name.isidentifier():
            raise NodeError(f"variable {name} cannot be given to a service: its name or its value is of another kind")
        quoted = "".join(f"\\{sign}" if sign in '\\"$`' else sign for sign in value)
        lines.append(f'{name}="{quoted}"\n')
    return "".join(lines)
