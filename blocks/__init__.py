"""What a team says once and names afterwards: a bucket, a node, an account, a repository, a baseline, who is told.

`python -m prefect block register -m blocks` (or `prefect block register -f blocks/__init__.py`) makes the types known to
a Prefect server, and so does `modal-eval init`. A flow gets a block's *name* as a parameter and loads it itself: what is
templated into `prefect.yaml` is stored in clear.
"""

from blocks.accounts import HubRepository, ModalAccount
from blocks.baselines import Baseline
from blocks.buckets import CheckpointBucket
from blocks.nodes import Node
from blocks.notifications import NotificationTarget

ALL = (CheckpointBucket, Node, ModalAccount, HubRepository, Baseline, NotificationTarget)

__all__ = [
    "ALL", "Baseline", "CheckpointBucket", "HubRepository", "ModalAccount", "Node", "NotificationTarget", "register_all",
]  # fmt: skip


def register_all() -> list[str]:
    """Make every type known to the Prefect server, or up to date there, and return their slugs. May be repeated."""
    for block in ALL:
        block.register_type_and_schema()
    return [block.get_block_type_slug() for block in ALL]
