"""The proxy that is the journal: every call of every harness goes through it, and none is paid for twice."""

from modal_eval.proxy.journal import check_identity
from modal_eval.proxy.process import Proxy
from modal_eval.proxy.reading import answered_rollouts
from modal_eval.proxy.settings import ProxySettings

__all__ = ["Proxy", "ProxySettings", "answered_rollouts", "check_identity"]
