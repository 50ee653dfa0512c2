"""Push one run: a sanitized copy, one commit, tried again until it stands or cannot."""

from __future__ import annotations

import os
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RemoteEntryNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars

from modal_eval import paths
from modal_eval.errors import HubError, boundary
from modal_eval.hub.card import merged_card
from modal_eval.hub.sanitize import Sanitized, sanitized_copy
from modal_eval.results.files import write_json
from modal_eval.results.run_folder import Run, run_group

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

TRIES = 8
LONGEST_DELAY_S = 30.0
PASSING = {408, 409, 412, 425, 429, 500, 502, 503, 504}
"""Statuses that may be another the next time; 412 says that somebody else has pushed meanwhile."""
CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Published:
    """Where a run stands on the Hub; also the content of `published.json`."""

    repo: str
    revision: str
    """The commit that holds the run."""
    url: str
    files: tuple[str, ...]
    """Paths in the repository."""
    replaced: int
    """Private values that were taken out of the copy."""


def push_run(
    run_dir: Path,
    repo: str,
    *,
    private: bool = True,
    token_env: str = "HF_TOKEN",  # noqa: S107 - a variable's name
    tries: int = TRIES,
    first_delay_s: float = 1.0,
) -> Published:
    """Upload a finished run to the data-set repository `repo` and write `published.json`.

    A repository that is not there is made, `private` or not; one that is there keeps its visibility. The run goes to
    `{env_id}--{org}--{model}/{run_id}/` in one commit with the data card; content that is there already makes none.
    Logs are not uploaded. Raises `HubError`; what passed by itself within `tries` is not seen.
    """
    run = Run.load(run_dir)
    token = _token(token_env)
    with boundary(HubError, f"pushing {run_dir} to {repo}"), tempfile.TemporaryDirectory() as folder:
        clean = sanitized_copy(run.run_dir, Path(folder), token=token, key_env=run.config.infra.api_key_env)
        push = _Push(HfApi(token=token), repo, private, f"{run_group(run.config)}/{run.run_id}", clean, Path(folder))
        revision = _retried(push, run.run_dir, token_env, tries, first_delay_s)
        published = Published(
            repo=repo,
            revision=revision,
            url=f"{push.api.endpoint}/datasets/{repo}/tree/{revision}/{push.folder}",
            files=(CARD, *sorted(push.contents())),
            replaced=clean.replaced,
        )
    write_json(run_dir / paths.PUBLISHED, asdict(published))
    return published


@dataclass(frozen=True, slots=True)
class _Push:
    """One run on its way to one repository."""

    api: HfApi
    repo: str
    private: bool
    folder: str
    clean: Sanitized
    scratch: Path

    def once(self) -> str:
        """Commit on top of what the repository holds now; returns the revision that holds the run."""
        self.clean.refuse_leaks({"the name of the run's folder": self.folder})
        self.api.create_repo(self.repo, repo_type="dataset", private=self.private, exist_ok=True)
        head = self.api.repo_info(self.repo, repo_type="dataset").sha
        card = merged_card(self._card_at(head), self.folder, self.clean.metadata)
        message = f"Add {self.clean.metadata.get('model')} on {self.clean.metadata.get('benchmark')}, run {self.folder}"
        self.clean.refuse_leaks(
            {CARD: card, "the name of the run's folder": self.folder, "the commit's title": message}
        )
        commit: CommitInfo = self.api.create_commit(
            self.repo,
            [
                CommitOperationAdd(CARD, card.encode()),
                *(CommitOperationAdd(path, content) for path, content in self.contents().items()),
            ],
            commit_message=message,
            repo_type="dataset",
            parent_commit=head,
        )
        return commit.oid

    def contents(self) -> dict[str, Path]:
        """The run's files by their path in the repository."""
        return {f"{self.folder}/{name}": path for name, path in self.clean.files.items()}

    def _card_at(self, revision: str | None) -> str:
        try:
            path = self.api.hf_hub_download(
                self.repo, CARD, repo_type="dataset", revision=revision, cache_dir=self.scratch / "cache"
            )
        except RemoteEntryNotFoundError:
            return ""
        return Path(path).read_text(encoding="utf-8")


def _token(token_env: str) -> str:
    token = os.environ.get(token_env) or get_token()
    if not token:
        error = HubError(
            f"no token for the Hub: set {token_env} to one with write access, or run `hf auth login` once; the run is "
            "unharmed and can be pushed later"
        )
        error.retryable = False
        raise error
    return token


def _retried(push: _Push, run_dir: Path, token_env: str, tries: int, first_delay_s: float) -> str:
    disable_progress_bars()
    for attempt in range(1, tries + 1):
        try:
            return push.once()
        except OfflineModeIsEnabled as error:
            raise _given_up("HF_HUB_OFFLINE is set; unset it and push again", error, retryable=False) from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise _given_up(
                    f"the Hub refused the token of {token_env} for {push.repo} ({status}: {_one_line(error)}); use one "
                    f"with write access to {push.repo.partition('/')[0]}",
                    error,
                    retryable=False,
                ) from error
            if status not in PASSING:
                raise _given_up(f"the Hub refused {push.repo}: {_one_line(error)}", error, retryable=False) from error
            last: Exception = error
            asked = error.response.headers.get("retry-after", "")
        except (HfHubHTTPError.__bases__[0], OSError) as error:  # type: ignore[misc]
            # The first is the root of whichever HTTP library huggingface_hub stands on: its connection faults.
            last, asked = error, ""
        if attempt < tries:
            delay = min(LONGEST_DELAY_S, first_delay_s * 2 ** (attempt - 1))
            wait = float(asked) if asked.isdigit() else delay * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
            time.sleep(min(wait, LONGEST_DELAY_S))
    raise _given_up(
        f"{push.repo} could not be pushed in {tries} tries, the last one: {_one_line(last)}; the run in {run_dir} is "
        f"unharmed, `modal-eval resume {run_dir} --push-to-hub={push.repo}` tries again",
        last,
        retryable=True,
    ) from last


def _given_up(message: str, cause: Exception, *, retryable: bool) -> HubError:
    error = HubError(message)
    error.retryable = retryable
    return error


def _one_line(error: Exception) -> str:
    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(said.split())[:300]
