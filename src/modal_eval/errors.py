"""The errors of modal-eval: a class says where it happened and who has to act.

    ModalEvalError
    ├── ConfigError        the person who typed the command: a key, a value, a missing setting   (exit 2)
    │   ├── IdentityError  the run folder belongs to another configuration                       (exit 2)
    │   └── RunLockedError another process is writing this run folder                            (exit 2)
    ├── CheckpointError    whoever made the model folder: a file is missing or broken
    │   └── IncompleteError nobody yet: the checkpoint is still being written or copied
    ├── EngineEnvError     whoever looks after the machine: uv, a package, a Debian package
    ├── NodeError          whoever looks after a node: SSH, its disk, its Python, its revision
    ├── GpuError           whoever looks after the node: no GPU, none free in time, a driver that does not answer
    ├── ServerError        the model server did not start, died, or cannot be reached
    ├── JournalError       the journal cannot be written or read (a full disk, a broken file)
    ├── HarnessError       the harness process failed as a whole
    ├── ScoringError       a score could not be computed; the rollout is unscored, never wrong
    │   └── SandboxError   the sandbox itself is missing or broken
    ├── HubError           the push to the Hub did not go through
    └── SuiteError         some benchmarks of a suite failed, or a gate found one that got worse

Library code raises plain Python errors; `boundary` gives them a name where a stage begins and keeps the cause.
A message says what happened, with the value, and then the way out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INCOMPLETE = 3
EXIT_INTERRUPTED = 130


class ModalEvalError(Exception):
    """Base of every error that is shown as one line, without a traceback."""

    exit_code = EXIT_FAILED
    retryable = False
    """Whether the same stage may succeed when it is simply run again."""


class ConfigError(ModalEvalError):
    """A setting is wrong or missing; nothing was started."""

    exit_code = EXIT_USAGE


class IdentityError(ConfigError):
    """The run folder's answers belong to another model, sampling, template, data file or harness."""


class RunLockedError(ConfigError):
    """Another live process is writing the same run folder."""


class CheckpointError(ModalEvalError):
    """The model cannot be loaded: a file is missing, broken, or cannot be fetched."""


class IncompleteError(CheckpointError):
    """Files of the checkpoint are not there, or not whole: it is still being written, or was not copied to the end."""


class EngineEnvError(ModalEvalError):
    """A harness's or an engine's environment is missing and cannot be made."""


class NodeError(ModalEvalError):
    """A node cannot be reached over SSH, or lacks what a worker needs."""


class GpuError(ModalEvalError):
    """No GPU can be had: there are too few, none came free in time, or the driver does not answer."""


class ServerError(ModalEvalError):
    """The model server did not start in time, died, or does not answer."""


class JournalError(ModalEvalError):
    """The journal cannot be written or read."""


class HarnessError(ModalEvalError):
    """The harness process failed as a whole; finished calls are in the journal."""

    retryable = True


class ScoringError(ModalEvalError):
    """A score could not be computed; the rollout counts as unscored."""

    retryable = True


class SandboxError(ScoringError):
    """The sandbox is missing or does not hold on this machine."""


class HubError(ModalEvalError):
    """The push to the Hub did not go through; the evaluation itself is unharmed."""

    retryable = True


class SuiteError(ModalEvalError):
    """Some benchmarks of a suite failed; the others have their numbers."""


@contextmanager
def boundary(error_class: type[ModalEvalError], what: str) -> Iterator[None]:
    """Turn a plain Python error into `error_class`, saying `what` was being done; a named error passes through."""
    try:
        yield
    except ModalEvalError:
        raise
    except Exception as error:
        raise error_class(f"{what}: {type(error).__name__}: {error}") from error
