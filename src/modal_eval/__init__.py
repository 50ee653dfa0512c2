"""Evaluations of language models as Prefect flows."""

__version__ = "0.1.0"
