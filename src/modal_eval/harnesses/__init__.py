"""Harnesses: who asks the questions and scores the answers, each in its own process and its own environment."""

from modal_eval.harnesses.environment import environment_for
from modal_eval.harnesses.job import HarnessApi, HarnessJob, HarnessReport, HarnessStart
from modal_eval.harnesses.run import describe, run_harness

__all__ = [
    "HarnessApi",
    "HarnessJob",
    "HarnessReport",
    "HarnessStart",
    "describe",
    "environment_for",
    "run_harness",
]
