"""What we ask Modal: its Python API, each call with a deadline, each failure in one line with the way out.

Without a network Modal's client waits for a minute before it says so; here the deadline decides.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import hashlib
import io
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from modal_eval.errors import ServerError

if TYPE_CHECKING:
    import modal

Result = TypeVar("Result")

ASK_S = 30.0
"""Longest time for one question."""
LOGS_S = 20.0
UPLOAD_S = 4 * 3600.0
LOGIN = "run `modal token new`, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET"


@dataclass(frozen=True, slots=True)
class LiveApp:
    """An app that is deployed, as Modal lists it."""

    name: str
    tags: dict[str, str] = field(default_factory=dict)
    created_at: datetime | None = None

    @property
    def deadline(self) -> float | None:
        """Unix time after which anybody may stop it; `None` when it does not say."""
        text = self.tags.get("deadline", "")
        return float(text) if text.isdecimal() else None


def configured() -> bool:
    """Whether this user has said who they are on Modal; needs neither Modal's package nor a network."""
    file = Path(os.environ.get("MODAL_CONFIG_PATH") or "~/.modal.toml").expanduser()
    return bool(os.environ.get("MODAL_TOKEN_ID")) or file.is_file()


def account() -> str:
    """Who asks, and in which environment, as a lease may say it: a digest of the token's id, never the token."""
    from modal.config import config

    digest = hashlib.sha256(str(config.get("token_id") or "").encode()).hexdigest()[:8]
    environment = config.get("environment")
    return f"{digest}/{environment}" if environment else digest


def require_account() -> None:
    """Raise `ServerError` when nobody has said who they are on Modal: before anything is prepared for it."""
    if not configured():
        raise ServerError(f"Modal does not know who asks: {LOGIN}")


def deploy(app: modal.App, name: str, seconds: float) -> None:
    """Deploy `app`; the first time Modal makes its image, which takes minutes."""
    _ask(lambda: app.deploy.aio(name=name), seconds, f"Modal does not deploy {name}")


def upload(volume: str, name: str, files: dict[str, Path]) -> bool:
    """Put `files` into `volume` under `name`, unless they are there already; returns whether anything was sent.

    A marker is written last, so an upload that was cut off is made again.
    """
    import modal

    marker = f"{name}.complete"

    async def ask() -> bool:
        held = modal.Volume.from_name(volume, create_if_missing=True)
        if marker in {entry.path.lstrip("/") async for entry in held.iterdir.aio("/", recursive=False)}:
            return False
        async with held.batch_upload(force=True) as batch:
            for relative, path in files.items():
                batch.put_file(path, f"/{name}/{relative}")
        async with held.batch_upload(force=True) as batch:
            batch.put_file(io.BytesIO(name.encode()), f"/{marker}")
        return True

    return _ask(ask, UPLOAD_S, f"Modal does not take the checkpoint {name}")


def missing_secrets(names: Sequence[str], seconds: float = ASK_S) -> list[str]:
    """Those of `names` that the account has no secret of. Raises `ServerError` when it cannot be asked."""
    import modal

    async def ask() -> list[str]:
        missing = []
        for name in names:
            try:
                await modal.Secret.from_name(name).hydrate.aio()
            except modal.exception.NotFoundError:
                missing.append(name)
        return missing

    return _ask(ask, seconds, "Modal does not say which secrets there are")


def web_url(app: str, function: str) -> str | None:
    """Where `function` of the deployed `app` answers; `None` when there is no such app."""
    import modal

    async def ask() -> str | None:
        try:
            return await modal.Function.from_name(app, function).get_web_url.aio()
        except modal.exception.NotFoundError:
            return None

    return _ask(ask, ASK_S, f"Modal does not say where {app} is")


def live_apps(prefix: str) -> list[LiveApp]:
    """The deployed apps whose names begin with `prefix`, each with its tags."""
    import modal

    async def ask() -> list[LiveApp]:
        environment = modal.Environment.from_context()
        apps = [app for app in await environment.apps.list.aio() if (app.name or "").startswith(prefix)]
        tags = await asyncio.gather(*(app.get_tags.aio() for app in apps))
        return [LiveApp(str(app.name), found, await _created(app)) for app, found in zip(apps, tags, strict=True)]

    return _ask(ask, ASK_S, "Modal does not list its apps")


async def _created(app: modal.App) -> datetime | None:
    return (await app.info.aio()).lifecycle.created_at


def set_tags(app: str, tags: dict[str, str]) -> None:
    """Replace what `app` says of itself; one that is gone says nothing."""
    _on_app(app, lambda found: found.set_tags.aio(tags), f"Modal does not take the tags of {app}")


def stop(app: str) -> bool:
    """Stop `app` with all its containers; returns whether this account has such an app. May be called twice."""
    return _on_app(app, lambda found: found.stop.aio(), f"Modal does not stop {app}")


def _on_app(name: str, work: Callable[[modal.App], Coroutine[Any, Any, None]], what: str) -> bool:
    import modal

    async def ask() -> bool:
        try:
            await work(await modal.App.lookup.aio(name))
        except modal.exception.NotFoundError:
            return False
        return True

    return _ask(ask, ASK_S, what)


def last_log_lines(app: str, lines: int) -> str:
    """The newest lines that the app's containers wrote."""
    import modal

    async def ask() -> str:
        found = await modal.App.lookup.aio(app)
        return "".join([entry.message async for entry in found.logs.tail.aio(lines)])

    return _ask(ask, LOGS_S, f"Modal does not give the log of {app}")


def _ask(work: Callable[[], Coroutine[Any, Any, Result]], seconds: float, what: str) -> Result:
    """The result of `work` within `seconds`. Raises `ServerError` in one line, whatever went wrong."""
    future = asyncio.run_coroutine_threadsafe(_begin(work), _loop())
    try:
        return future.result(seconds)
    except concurrent.futures.TimeoutError:
        future.cancel()
        raise ServerError(
            f"{what}: no answer within {seconds:g} s; check the network and Modal's status page"
        ) from None
    except Exception as error:
        raise ServerError(f"{what}: {_reason(error)}") from error
    except BaseException:
        future.cancel()  # an interrupted deployment is not to come up behind our back
        raise


async def _begin(work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    return await work()


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One loop on a thread of its own, so that a call that cannot be cancelled holds nobody up."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="modal-calls", daemon=True).start()
    return loop


def _reason(error: Exception) -> str:
    """What Modal said, and the way out."""
    line = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    kind = type(error).__name__
    if kind == "AuthError":
        return f"it does not know who asks ({line}); {LOGIN}"
    if kind == "NotFoundError" and "ecret" in str(error):
        return (
            f"a secret is missing ({line}); make it with `modal secret create huggingface HF_TOKEN=…`, or drop it with "
            "--infra.secrets=[]"
        )
    if isinstance(error, OSError) or kind in {"ConnectionError", "TimeoutError"}:
        return f"it cannot be reached ({line}); check the network and Modal's status page"
    return line
