"""The command line: parse, guard, call. One file a command."""

from modal_eval.cli.app import main

__all__ = ["main"]
