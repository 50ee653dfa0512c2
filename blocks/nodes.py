"""The team's machines with GPUs."""

from prefect.blocks.core import Block
from pydantic import Field


class Node(Block):
    """A machine with GPUs that `modal-eval node` looks after over SSH. It holds no key: SSH's own agent and files do."""

    _block_type_name = "Node"
    _block_type_slug = "node"
    _description = "A machine with GPUs whose worker takes runs."

    host: str = Field(description="Name or address, or a Host of ~/.ssh/config.")
    user: str | None = None
    port: int | None = Field(default=None, ge=1, le=65535)
    home: str = Field(pattern="^/", description="Absolute path of the checkout of modal-eval on the node.")
    python: str = Field(pattern="^/", description="Absolute path of the Python there that has modal-eval.")
    work_pool: str = Field(default="a100", description="The work pool that its worker serves.")
    work_queues: list[str] = Field(default=[], description="Only these queues; empty takes all, by their priority.")
    limit: int = Field(default=8, ge=1, description="Runs at a time; the GPUs are shared by their leases.")
    revision: str | None = Field(default=None, description="Commit of the code there when its worker was started.")
    gpus: list[str] = Field(default=[], description="Names of its GPUs when its worker was started.")
    systemd: bool = Field(default=True, description="Whether its worker is a systemd user unit.")
    draining: bool = Field(default=False, description="Whether it finishes what runs and takes nothing new.")
