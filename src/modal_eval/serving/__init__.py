"""Model servers: start, ready, stop, with a lease on disk before anybody waits."""

from modal_eval.serving.cleaning import Cleaned, Deed, clean, stop_all, stop_lease
from modal_eval.serving.endpoint import endpoint_key
from modal_eval.serving.leases import holder_alive, is_live, leases
from modal_eval.serving.modal_calls import configured as modal_configured
from modal_eval.serving.modal_calls import require_account as require_modal
from modal_eval.serving.modal_keys import key_path
from modal_eval.serving.modal_servers import Orphan, orphans, stop_orphan
from modal_eval.serving.placing import overflow_after, placed
from modal_eval.serving.server import deploy, server_exit, start_server, stop_server
from modal_eval.serving.servers import HeldGpus, Server, held_gpus, servers

__all__ = [
    "Cleaned",
    "Deed",
    "HeldGpus",
    "Orphan",
    "Server",
    "clean",
    "deploy",
    "endpoint_key",
    "held_gpus",
    "holder_alive",
    "is_live",
    "key_path",
    "leases",
    "modal_configured",
    "orphans",
    "overflow_after",
    "placed",
    "require_modal",
    "server_exit",
    "servers",
    "start_server",
    "stop_all",
    "stop_lease",
    "stop_orphan",
    "stop_server",
]
