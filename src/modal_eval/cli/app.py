"""The `modal-eval` command: what it knows, and how every fault becomes one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App, Argument, CycloptsError, MissingArgumentError, Parameter
from pydantic import ValidationError

from modal_eval import __version__
from modal_eval.cli import (
    batch,
    benchmarks,
    deploy,
    doctor,
    gpus,
    init,
    node,
    resume,
    run,
    runs,
    score,
    status,
    stop,
    suite,
    watch,
    worker,
)
from modal_eval.cli.output import complain
from modal_eval.config.load import explain
from modal_eval.config.models import Overrides
from modal_eval.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USAGE, ModalEvalError

EPILOGUE = (
    """Exit codes: 0 done, 1 failed, 2 wrong usage (nothing was started), 3 finished but incomplete, 130 interrupted."""
)

app = App(
    name="modal-eval",
    help="Evaluate language models: a real server, a real benchmark, and no finished answer is ever paid for twice.",
    help_epilogue=EPILOGUE,
    version=__version__,
    suppress_keyboard_interrupt=False,  # `run_command` says what an interrupt means
    default_parameter=Parameter(negative=(), name_transform=lambda name: name, show_default=False),
)
for module in (
    run,
    suite,
    batch,
    resume,
    score,
    runs,
    benchmarks,
    deploy,
    status,
    stop,
    watch,
    worker,
    node,
    gpus,
    doctor,
    init,
):
    app.command(module.command, name=module.__name__.rpartition(".")[2])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    sys.exit(run_command(sys.argv[1:] if arguments is None else arguments))


def run_command(arguments: Sequence[str]) -> int:
    try:
        code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        complain(usage_line(error))
        return EXIT_USAGE
    except ModalEvalError as error:
        complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        complain("interrupted; finished answers are kept: `modal-eval resume` goes on")
        return EXIT_INTERRUPTED
    return code if isinstance(code, int) else EXIT_DONE


def usage_line(error: CycloptsError) -> str:
    """What was typed wrong, in one line."""
    if isinstance(error.__cause__, ValidationError):
        return explain(error.__cause__, Overrides)
    if isinstance(error, MissingArgumentError) and error.argument and not error.argument.tokens and not error.keyword:
        return missing_line(" ".join(error.command_chain or ()), error.argument)
    return f"{' '.join(str(error).split())} `modal-eval --help` lists what there is"


def missing_line(command: str, argument: Argument) -> str:
    """What a command cannot do without, and every way to give it."""
    names = argument.names if argument.index is None else [argument.name.lstrip("-").upper()]
    variables = argument.parameter.env_var or ()
    ways = " or ".join([*names, *(variables if isinstance(variables, tuple) else (variables,))])
    return (
        f"`{command}` needs {ways}. {argument.parameter.help or ''} `modal-eval {command} --help` lists what there is"
    )
