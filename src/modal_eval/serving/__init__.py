"""Model servers: start, ready, stop, with a lease on disk before anybody waits."""

from modal_eval.serving.ending import stop_lease, sweep_dead
from modal_eval.serving.endpoint import endpoint_key
from modal_eval.serving.leases import holder_alive, is_live, leases
from modal_eval.serving.modal_calls import configured as modal_configured
from modal_eval.serving.modal_calls import require_account as require_modal
from modal_eval.serving.modal_keys import key_path
from modal_eval.serving.modal_servers import Orphan, deploy, orphans, stop_orphan
from modal_eval.serving.server import server_exit, start_server, stop_server

__all__ = [
    "Orphan",
    "deploy",
    "endpoint_key",
    "holder_alive",
    "is_live",
    "key_path",
    "leases",
    "modal_configured",
    "orphans",
    "require_modal",
    "server_exit",
    "start_server",
    "stop_lease",
    "stop_orphan",
    "stop_server",
    "sweep_dead",
]
