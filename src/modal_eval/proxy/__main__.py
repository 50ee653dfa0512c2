"""`python -m modal_eval.proxy`: settings as one JSON line on stdin, `{"port": N}` as the first line on stdout.

What keeps it from starting is said in place of the port, as `{"kind": "RunLockedError", "error": "…"}`.
"""

from __future__ import annotations

import gc
import json
import logging
import logging.handlers
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

import uvicorn

from modal_eval.errors import ConfigError, ModalEvalError
from modal_eval.proxy.app import make_app
from modal_eval.proxy.journal import Journal
from modal_eval.proxy.settings import ProxySettings

BACKLOG = 4096
LOG_LINES = 256
LOG_EVERY_S = 1.0
GRACE_S = 1
KEEP_ALIVE_S = 3600
"""A connection without a call stays open longer than any client keeps it: closed by us, it could break just when the client
writes its next call, which nobody may then send again."""
SWITCH_S = 0.0001
"""How long the journal's thread may have to wait for the interpreter after a flush; Python's default is 5 ms."""


def main() -> int:
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # uvicorn raises them again when it has ended; the log is flushed then
        signal.signal(number, lambda *_: sys.exit(0))
    sys.setswitchinterval(SWITCH_S)
    settings = ProxySettings.from_json(sys.stdin.readline())
    log = open_log(settings)
    try:
        key = read_key(settings.api_key_env)
        if key:
            log.addFilter(without(key))
        journal = Journal(
            settings.journal,
            settings.identity,
            reserve_bytes=settings.reserve_bytes,
            read_only=not settings.upstreams,
        )
    except ModalEvalError as error:
        say({"kind": type(error).__name__, "error": str(error)})
        return error.exit_code
    finally:
        log.flush()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(BACKLOG)
        port = listener.getsockname()[1]
        logging.info("listening on http://127.0.0.1:%d; %d finished calls in the journal", port, len(journal))
        logging.info("forwarding to %s", ", ".join(settings.upstreams) or "nobody: replay")
        if settings.api_key_env:
            logging.info("with the key in %s", settings.api_key_env)
        config = uvicorn.Config(
            make_app(settings, journal, key, on_ready=lambda: say({"port": port})),
            loop="uvloop",
            http="httptools",
            ws="none",
            access_log=False,
            proxy_headers=False,
            log_config=None,
            date_header=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_S,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        gc.freeze()  # what is loaded by now stays: a collection in the middle of calls need not look at it
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def read_key(name: str | None) -> str | None:
    if name is None:
        return None
    if key := os.environ.get(name):
        return key
    raise ConfigError(
        f"infra.api_key_env names {name}, but there is no such environment variable; export {name}=… first"
    )


def open_log(settings: ProxySettings) -> logging.handlers.MemoryHandler:
    """A line per call, written in blocks: one write a call would cost more than the journal does."""
    settings.log_path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(settings.log_path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    buffer = logging.handlers.MemoryHandler(LOG_LINES, flushLevel=logging.WARNING, target=file)
    logging.basicConfig(level=logging.INFO, handlers=[buffer], force=True)
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # no line of ours says them
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    flusher = threading.Thread(target=flush_for_ever, args=(buffer,), name="log", daemon=True)
    flusher.start()
    return buffer


def without(key: str) -> Callable[[logging.LogRecord], bool]:
    """A server may quote the key in an error of its own; the log says *** there."""

    def mask(record: logging.LogRecord) -> bool:
        record.msg, record.args = record.getMessage().replace(key, "***"), ()
        return True

    return mask


def flush_for_ever(buffer: logging.handlers.MemoryHandler) -> None:
    pause = threading.Event()
    while not pause.wait(LOG_EVERY_S):
        buffer.flush()


def say(message: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
