"""Model servers: start, ready, stop, with a lease on disk before anybody waits."""

from modal_eval.serving.endpoint import endpoint_key
from modal_eval.serving.leases import holder_alive, leases, stop_lease, sweep_dead
from modal_eval.serving.server import server_exit, start_server, stop_server

__all__ = [
    "endpoint_key",
    "holder_alive",
    "leases",
    "server_exit",
    "start_server",
    "stop_lease",
    "stop_server",
    "sweep_dead",
]
