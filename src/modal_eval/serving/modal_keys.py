"""The keys of our servers on Modal, and the name that our apps on Modal bear.

Each app has a key of its own: in a file of this user's state with mode 0600, on Modal in the app's secret, in our process
and the proxy's in a variable. It is in no command line, log, result or lease.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from modal_eval import paths
from modal_eval.records import SERVER_KEY_PREFIX


def folder() -> Path:
    place = paths.state_dir() / "modal"
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    return place


def owner() -> str:
    """This user's state, told apart from every other: part of our apps' names and one of their tags. No secret."""
    return _kept(folder() / "owner", lambda: secrets.token_hex(6))


def key_path(app: str) -> Path:
    return folder() / f"{app}.key"


def key(app: str) -> str:
    """The key of `app`, made when it has none."""
    return _kept(key_path(app), lambda: secrets.token_urlsafe(32))


def has_key(app: str) -> bool:
    return key_path(app).is_file()


def forget(app: str) -> None:
    key_path(app).unlink(missing_ok=True)


def key_variable(app: str) -> str:
    """Put the key of `app` into this process's environment, for the proxy, and return the variable's name."""
    name = SERVER_KEY_PREFIX + hashlib.sha256(app.encode()).hexdigest()[:12].upper()
    os.environ[name] = key(app)
    return name


def _kept(path: Path, make: Callable[[], str]) -> str:
    """What stands in `path`, written whole by the first who asks."""
    if not path.is_file():
        temporary = path.with_suffix(f".{os.getpid()}.{secrets.token_hex(4)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(make())
        try:
            os.link(temporary, path)
        except FileExistsError:  # somebody was faster, and theirs counts
            pass
        finally:
            temporary.unlink()
    return path.read_text(encoding="utf-8")
