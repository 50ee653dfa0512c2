"""This machine's GPUs: who has which, who waits, and what was left behind on them."""

from modal_eval.gpus import history
from modal_eval.gpus.folder import Folder
from modal_eval.gpus.inventory import inventory, visible
from modal_eval.gpus.lease import GpuLease
from modal_eval.gpus.records import Gpu, GpuProcess, Holder
from modal_eval.gpus.survey import Survey, survey
from modal_eval.gpus.taking import take, try_take, usable
from modal_eval.gpus.zombies import end_ours as end_leftovers

__all__ = [
    "Folder",
    "Gpu",
    "GpuLease",
    "GpuProcess",
    "Holder",
    "Survey",
    "end_leftovers",
    "history",
    "inventory",
    "survey",
    "take",
    "try_take",
    "usable",
    "visible",
]
