"""In whose name a flow run acts: blocks that its parameters name, loaded where they are needed and stored nowhere."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from prefect.blocks.core import Block

from blocks.accounts import HubRepository, ModalAccount
from modal_eval.errors import ConfigError


@contextmanager
def in_the_name_of(modal_account: str | None, hub_repository: str | None) -> Iterator[str | None]:
    """Have Modal's and the Hub's clients act for these blocks, here and in what is started here.

    Yields the repository that runs are pushed to. Raises `ConfigError` for a name that no block has.
    """
    account = named(ModalAccount, modal_account) if modal_account else None
    repository = named(HubRepository, hub_repository) if hub_repository else None
    variables = {**(account.variables() if account else {}), **(repository.variables() if repository else {})}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield repository.repository if repository else None
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


BlockOf = TypeVar("BlockOf", bound=Block)


def named(kind: type[BlockOf], name: str) -> BlockOf:
    """The block of this kind with this name."""
    try:
        return kind.load(name)
    except ValueError as error:  # Prefect has no class of its own for it
        raise ConfigError(
            f"there is no {kind.get_block_type_name()} block called '{name}'; make one on the page Blocks of Prefect's UI"
        ) from error
