"""What both adapters share: the job, one rollout's outcome, and the row that is made of it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from modal_eval.harnesses.adapters.channel import plain

ROLLOUT_HEADER = "X-Modal-Eval-Rollout"
"""Says to the proxy which rollout a call belongs to: `example_id/rollout`."""
MS_HEADER = "X-Modal-Eval-Ms"
"""The proxy's word of how long a call took, without its wait for a place there."""

OPENAI_PARAMETERS = frozenset(
    [
        "temperature",
        "top_p",
        "seed",
        "stop",
        "n",
        "logprobs",
        "top_logprobs",
        "logit_bias",
        "presence_penalty",
        "frequency_penalty",
        "response_format",
        "reasoning_effort",
        "parallel_tool_calls",
        "tool_choice",
        "user",
    ]
)
"""What OpenAI's client takes by name; vLLM's and llama.cpp's own parameters travel beside."""

OVERLONG_PHRASES = (
    "context length",
    "context size",
    "context window",
    "maximum model length",
    "exceed_context_size",
    "prompt_too_long",
    "prompt is too long",
    "exceeds the configured limit",
    "exceed the configured limit",
    "exceeded model",
)
"""How vLLM, llama.cpp and the hosted services say, with status 400, that a prompt does not fit."""


PACKAGE = Path(__file__).resolve().parents[2]
OWN_ENVIRONMENTS, ENVKIT = PACKAGE / "harnesses" / "environments", PACKAGE / "harnesses" / "envkit"

ROW_INFO = "modal_eval_info"
"""Where an environment's scoring leaves in verifiers' state what it adds to the row's `info`."""


class SetupError(Exception):
    """The environment cannot be loaded or used; the message names the way out."""


@dataclass
class Job:
    """The job line; the keys are those of `HarnessJob`."""

    env_id: str
    env_args: dict[str, Any]
    base_url: str
    model: str
    sampling: dict[str, Any]
    num_examples: int | None
    rollouts: int
    max_concurrent: int
    rollout_timeout_s: float
    api: str
    done: set[tuple[int, int]]
    condemned: dict[tuple[int, int], dict[str, str]]
    """Rollouts that blocked an earlier adapter, with the error that their rows get; they are not run."""
    module_paths: list[str]
    harness: str = "verifiers"
    phase: str = "both"
    scoring_args: list[str] = field(default_factory=list)
    scoring_workers: int | None = None

    @classmethod
    def from_line(cls, data: dict[str, Any]) -> Job:
        pairs = {(example_id, rollout) for example_id, rollout in data.pop("done")}
        condemned = {(example_id, rollout): error for example_id, rollout, error in data.pop("condemned")}
        return cls(**data, done=pairs, condemned=condemned)

    @property
    def module_name(self) -> str:
        return self.env_id.split("/")[-1].split("@")[0].replace("-", "_")

    def sampling_for(self, rollout: int) -> dict[str, Any]:
        """The request's parameters for OpenAI's client; what is no parameter of OpenAI's stands in `extra_body`.

        With a seed, each rollout of an example has its own. `max_tokens` goes as it is, because not every server knows
        its new name `max_completion_tokens`.
        """
        given = dict(self.sampling)
        extra = dict(given.pop("extra_body", None) or {})
        extra |= {key: given.pop(key) for key in list(given) if key not in OPENAI_PARAMETERS}
        if given.get("seed") is not None:
            given["seed"] += rollout
        return {**given, "extra_body": extra} if extra else given


@dataclass
class CallLog:
    """What the server said of one rollout's calls."""

    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    calls: int = 0
    ms: float = 0.0
    """How long they took without their wait for a place, where the proxy says so."""

    def record(self, finish_reason: str | None, usage: Any) -> None:
        self.calls += 1
        self.finish_reason = finish_reason
        # verifiers.v1 counts what the server had cached apart, and has the sum under another name
        self.prompt_tokens += getattr(usage, "input_tokens", None) or getattr(usage, "prompt_tokens", 0) or 0
        self.completion_tokens += getattr(usage, "completion_tokens", 0) or 0


CALLS: ContextVar[CallLog | None] = ContextVar("modal_eval_calls", default=None)
"""Where the running task's calls are counted."""


@dataclass
class Example:
    """One example as its row shows it, before anything is generated."""

    example_id: int
    prompt: Any
    answer: Any
    info: Any
    task: str = "default"


@dataclass
class Outcome:
    """What became of one rollout."""

    completion: Any = field(default_factory=list)
    prompt: Any = None
    """Replaces the example's prompt where the environment built another."""
    reward: float | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    error: dict[str, str] | None = None
    generation_s: float = 0.0
    scoring_s: float = 0.0
    calls: CallLog = field(default_factory=CallLog)
    num_turns: int = 0
    stop_condition: str | None = None
    truncated: bool = False
    extracted: str | None = None
    """The answer that was found in the completion, for votes among samples: empty where there is none, `None` where the
    benchmark does not look for one."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """What scoring adds to the example's own."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What the row shows besides, and what is no number: verdicts, the code that was run."""
    pending: bool = False
    """Generated and not scored yet: the score phase makes the row whole."""


class Backend(Protocol):
    """A harness with a benchmark loaded."""

    harness: str

    examples: list[Example]
    grouped: bool
    """All rollouts of an example are scored together."""
    asks_ahead: bool
    """A rollout is a call and nothing else: as many again may wait at the proxy, so that the server never waits for us."""
    version: str
    api: str
    environment_version: str | None
    environment_sha256: str | None
    """Identity of the code that asks and scores."""
    data: dict[str, Any]
    """What the environment says of its data."""

    async def open(self) -> None: ...

    async def run_one(self, position: int, rollout: int, calls: CallLog) -> Outcome: ...

    async def run_group(self, position: int, rollouts: Sequence[int], calls: Sequence[CallLog]) -> list[Outcome]: ...

    async def close(self) -> None: ...


@runtime_checkable
class RunsWhole(Protocol):
    """A harness that cannot run one rollout by itself, only everything at once."""

    async def run_whole(self, driver: Any) -> None:
        """Hand each row of `driver.examples` to `driver.write(example, rollout, outcome)`."""


def fault(kind: str, error: BaseException | str, type_name: str | None = None) -> dict[str, str]:
    """An error as a row shows it. `kind`: server, environment, timeout or scoring."""
    if isinstance(error, str):
        return {"type": type_name or "Error", "message": error, "fault": kind}
    cause = error
    while not str(cause) and (deeper := cause.__cause__ or cause.__context__) is not None:
        cause = deeper
    return {"type": type_name or type(error).__name__, "message": str(cause) or repr(cause), "fault": kind}


def last_text(completion: Any) -> str:
    """Text of the model's last message; a call of a tool counts as text."""
    if isinstance(completion, str):
        return completion
    for message in reversed(completion or []):
        if message.get("role") != "assistant":
            continue
        if message.get("tool_calls"):
            return "tool call"
        content = message.get("content")
        if isinstance(content, list):
            return "".join(part.get("text", "") for part in content if isinstance(part, dict))
        return content or ""
    return ""


def row(example: Example, rollout: int, outcome: Outcome) -> dict[str, Any]:
    """One line of `results.jsonl`. A rollout with an error has no reward: null is unscored, 0 is wrong."""
    reward, error = outcome.reward, outcome.error
    if error is None and not outcome.pending and (reward is None or not math.isfinite(reward)):
        error = fault("scoring", f"the environment's reward is {reward}, not a number", "ValueError")
    completion = plain(outcome.completion)
    log = outcome.calls
    line: dict[str, Any] = {
        "example_id": example.example_id,
        "prompt": plain(outcome.prompt if outcome.prompt is not None else example.prompt),
        "completion": completion,
        "task": example.task,
        "reward": None if error else reward,
        "generation_ms": round(outcome.generation_s * 1000, 3),
        "scoring_ms": round(outcome.scoring_s * 1000, 3),
        "total_ms": round((outcome.generation_s + outcome.scoring_s) * 1000, 3),
        "info": {**(plain(example.info) or {}), **plain(outcome.info)},
        "has_error": 1.0 if error else 0.0,
        "rollout": rollout,
        "answer": plain(example.answer),
        "error": error,
        "finish_reason": log.finish_reason,
        "truncated": outcome.truncated or log.finish_reason == "length",
        "empty": error is None and not last_text(completion).strip(),
        "usage": {"prompt_tokens": log.prompt_tokens, "completion_tokens": log.completion_tokens},
        "num_turns": outcome.num_turns,
        "stop_condition": outcome.stop_condition,
    }
    if outcome.pending and error is None:
        line["pending"] = True
    line |= plain(outcome.columns)
    if outcome.extracted is not None:
        line["extracted"] = outcome.extracted
    for name, value in outcome.metrics.items():
        # num_turns is verifiers' own metric and ours at once; any other name of a column is the environment's
        if name != "num_turns":
            line[name if name not in line else f"metric_{name}"] = plain(value)
    return line


def digest_of_examples(examples: Iterable[Example], without: Iterable[str] = ()) -> str:
    """Identity of the data that is asked, whatever it was loaded from, `without` keys of `info` that only say how it is
    scored."""
    digest, left_out = hashlib.sha256(), frozenset(without)
    for example in examples:
        info = plain(example.info)
        if left_out and isinstance(info, dict):
            info = {key: value for key, value in info.items() if key not in left_out}
        line = [example.example_id, example.prompt, example.answer, info]
        digest.update(json.dumps(plain(line), sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def digest_of_prompts(examples: Iterable[Example]) -> str:
    """Identity of what is asked alone: a scorer may come to know better answers, and the questions stay the same."""
    digest = hashlib.sha256()
    for example in examples:
        line = [example.example_id, plain(example.prompt)]
        digest.update(json.dumps(line, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def digest_of_file(path: Path) -> str:
    with path.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


def digest_of_files(folder: Path, files: Iterable[Path]) -> str:
    """Of contents and names below `folder`, in whichever order they come."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return f"sha256:{digest.hexdigest()}"


def digest_of_module(name: str) -> str | None:
    """Identity of an environment's code: all Python files of its module, and for ours of the graders that they share."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return None
    origin = Path(spec.origin)
    if origin.name != "__init__.py":
        return digest_of_file(origin)
    files = list(origin.parent.rglob("*.py"))
    if not origin.resolve().is_relative_to(OWN_ENVIRONMENTS):
        return digest_of_files(origin.parent, files)
    return digest_of_graders([*(file.resolve() for file in files), *ENVKIT.glob("*.py")])


def digest_of_graders(files: Iterable[Path]) -> str:
    """Identity of scoring by code of ours: `files`, what runs code in the sandbox, and the version that judges formulas."""
    code = digest_of_files(PACKAGE, [*files, *(PACKAGE / "scoring").glob("*.py")])
    try:
        judge = importlib.metadata.version("math-verify")
    except importlib.metadata.PackageNotFoundError:  # an environment without one
        return code
    return f"sha256:{hashlib.sha256(f'{code} math-verify {judge}'.encode()).hexdigest()}"


def describe_data(job: Job, backend: Backend) -> dict[str, Any]:
    """The data's identity: the examples themselves, the files they came from, and the environment's own words."""
    named = job.env_args.get("data_files") or []
    files = [named] if isinstance(named, str) else named
    paths = [Path(str(file)) for file in (files.values() if isinstance(files, dict) else files)]
    return {
        "examples": len(backend.examples),
        "sha256": digest_of_examples(backend.examples, without=job.scoring_args),
        "prompts_sha256": digest_of_prompts(backend.examples),
        "files": {path.name: digest_of_file(path) for path in paths if path.is_file()},
        **plain(backend.data),
    }


def package_version(module_name: str) -> str | None:
    """Version of the package that an environment's module was installed with; none for a plain folder."""
    for distribution in importlib.metadata.packages_distributions().get(module_name, []):
        return importlib.metadata.version(distribution)
    return None
