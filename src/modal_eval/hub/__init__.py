"""The push of a finished run to the Hugging Face Hub, as a private data-set repository."""

from modal_eval.hub.push import Published, push_run

__all__ = ["Published", "push_run"]
