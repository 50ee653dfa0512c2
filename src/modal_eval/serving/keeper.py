"""The process that has a server which outlives its run: `python -m modal_eval.serving.keeper FOLDER`.

It starts the replicas that `FOLDER/asked.json` asks for, says in `FOLDER/state.json` how that goes, and ends them, and
itself, as soon as no lease of the server's name is live: the runs have given it back, and the time for which it was kept
is over. Its replicas stand under guardians, as a run's own do, so they end with it however it ends.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from modal_eval import checkpoints
from modal_eval.config.models import RunConfig
from modal_eval.errors import ModalEvalError, ServerError
from modal_eval.records import PreparedModel
from modal_eval.serving import replicas as processes
from modal_eval.serving import sharing
from modal_eval.serving.keeper_state import ASKED, STATE, State, read_state
from modal_eval.serving.leases import drop_lease, new_lease_id, write_whole

LOOK_S = 1.0
"""How often it looks whether it is still wanted, and whether its replicas live."""
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
HEARD = 20
"""So many of its latest words stay in its state."""


class Unwanted(BaseException):
    """Nobody has a right to the server any more, or this process was asked to end. Nothing but the exit handles it."""


class Keeper:
    """One server, from its start to its end."""

    def __init__(self, folder: Path) -> None:
        asked = json.loads((folder / ASKED).read_text(encoding="utf-8"))
        self.name = folder.name
        self.config = RunConfig.model_validate(asked["config"])
        self.model = PreparedModel.from_json(asked["model"])
        self.owner = processes.Owner(new_lease_id(), f"the kept server {self.name}", folder / "logs", app=self.name)
        self.path = folder / STATE
        self.state = State.mine()

    def write(self) -> None:
        write_whole(self.path, vars(self.state))

    def say(self, text: str) -> None:
        self.state.said = [*self.state.said, text][-HEARD:]
        self.state.said_count += 1
        self.write()

    def leave_if_unwanted(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        """Under the lock nobody can come while it goes: without its state, the next run starts a keeper of its own."""
        with sharing.lock(self.name):
            if sharing.wanted(self.name):
                return
            for lease in sharing.shares(self.name):
                drop_lease(lease)
            self.path.unlink(missing_ok=True)
        be_deaf()
        raise Unwanted

    def leave(self, _number: int, _frame: FrameType | None) -> None:
        self.path.unlink(missing_ok=True)
        be_deaf()
        raise Unwanted

    def fail(self, error: Exception) -> None:
        """Say why there is no server, at once: nobody is to come to one that is being ended."""
        be_deaf()
        known = isinstance(error, ModalEvalError)
        self.state.fault = str(error) if known else f"{type(error).__name__}: {error}"
        self.state.fault_kind = type(error).__name__ if known else ServerError.__name__
        with sharing.lock(self.name):
            current = read_state(self.path.parent)
            if current is None or current.pid == self.state.pid:  # else another keeper has taken the name over
                self.write()

    def run(self) -> None:
        self.write()
        hold = checkpoints.use(self.model)
        try:
            running, facts = processes.start(self.config, self.model, self.owner, say=self.say)
            try:
                self.state.urls = [f"{replica.url}/v1" for replica in running]
                self.state.facts = facts
                self.say(f"{self.name} is ready")
                while (last_words := processes.look_after(running)) is None:
                    time.sleep(LOOK_S)
                self.fail(ServerError(last_words))
            finally:
                be_deaf()
                processes.end(running)
        finally:
            if hold:
                hold.close()


def listen(keeper: Keeper) -> None:
    """Let the clock ask, whatever the keeper does meanwhile, and let signals end it in order."""
    signal.signal(signal.SIGALRM, keeper.leave_if_unwanted)
    for number in ASKING:
        signal.signal(number, keeper.leave)
    signal.setitimer(signal.ITIMER_REAL, LOOK_S, LOOK_S)


def be_deaf() -> None:
    """Nothing cuts the ending short; it has limits of its own."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in (signal.SIGALRM, *ASKING):
        signal.signal(number, signal.SIG_IGN)


def main(folder: Path) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(name)s | %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    keeper = Keeper(folder)
    try:
        listen(keeper)
        keeper.run()
    except Unwanted:
        return 0
    except Exception as error:
        logging.exception("%s", keeper.name)
        keeper.fail(error)
    return 1 if keeper.state.fault else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
