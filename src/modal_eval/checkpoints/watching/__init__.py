"""New checkpoints on S3: noticed, waited for until they are whole, and announced once."""

from modal_eval.checkpoints.watching.announcement import Announcement, name_parts
from modal_eval.checkpoints.watching.memory import Memory
from modal_eval.checkpoints.watching.watcher import Outcome, Watcher

__all__ = ["Announcement", "Memory", "Outcome", "Watcher", "name_parts"]
