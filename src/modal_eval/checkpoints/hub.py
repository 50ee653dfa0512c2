"""Models of the Hugging Face Hub, pinned to a commit."""

from __future__ import annotations

from pathlib import Path

from modal_eval.errors import CheckpointError

WANTED_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "*.tiktoken")
"""What an engine loads; a repository holds copies in other formats as well."""
DESCRIPTION_FILES = tuple(pattern for pattern in WANTED_FILES if pattern != "*.safetensors")
"""What tells how a model is asked, without its weights."""


def fetch(name: str, wanted: str | None, patterns: tuple[str, ...] = WANTED_FILES) -> tuple[Path, str]:
    """Download the files of `name` that fit `patterns` at revision `wanted` (default: the newest); returns the folder and the commit.

    When the Hub cannot be reached, the commit that was downloaded last is taken. `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`
    and `HF_HUB_OFFLINE` mean what they mean everywhere. Raises `CheckpointError` in one line.
    """
    from huggingface_hub import snapshot_download  # slow to import, and only a Hub model needs it
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        path = Path(snapshot_download(name, revision=wanted, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise CheckpointError(f"'{name}' is no folder here and no name that the Hub could have: {error}") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"model {name} is gated; accept its terms on its page and set HF_TOKEN to a token of that account"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"'{name}' is neither a folder here nor a model on the Hub; check the name, or set HF_TOKEN if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"model {name} has no revision '{wanted}'; see its branches and tags") from error
    except Exception as error:  # the library's HTTP client, and with it the classes of its errors, vary by version
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise CheckpointError(
            f"model {name} is no folder here, not in the cache, and cannot be fetched from the Hub "
            f"({type(error.__cause__ or error).__name__}: {reason}); give a local folder, or check the network and "
            "HF_ENDPOINT"
        ) from error
    return path, path.name  # the cache calls a snapshot's folder by its commit
