"""Where weights come from, whether they are whole, and which chat template goes with them."""

from modal_eval.checkpoints.cache import Hold, use
from modal_eval.checkpoints.resolve import resolve_model

__all__ = ["Hold", "resolve_model", "use"]
