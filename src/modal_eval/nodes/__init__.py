"""The team's machines, looked after over SSH: what is there, and the worker that runs there as a service."""

from modal_eval.nodes.service import Facts, Service, inspect, install_checkout
from modal_eval.nodes.ssh import Host

__all__ = ["Facts", "Host", "Service", "inspect", "install_checkout"]
