"""`modal-eval stop`: end what a dead run left behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated

from cyclopts import Parameter

from modal_eval import serving
from modal_eval.cli.options import Json
from modal_eval.cli.output import complain, print_json, talk
from modal_eval.cli.status import benchmark_of, found_on_modal
from modal_eval.config.load import kept_name, split_revision
from modal_eval.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from modal_eval.serving import Cleaned, Server


def command(
    *,
    model: Annotated[
        str | None, Parameter(name=["-m", "--model"], help="The servers of this model, live ones too.")
    ] = None,
    benchmark: Annotated[
        str | None, Parameter(name=["-b", "--benchmark"], help="The servers of runs of this benchmark, live ones too.")
    ] = None,
    all: Annotated[bool, Parameter(name="--all", help="Also servers whose run is still alive.")] = False,  # noqa: A002
    json: Json = False,
) -> int:
    """Stop servers, here and on Modal: those that nobody has a right to any more, those of a model or a benchmark that is
    named, or all.

    Nobody has a right to a server whose run is dead or whose deadline has passed. An app on Modal that another machine
    deployed is stopped once its deadline has passed, and no sooner.
    """
    done = Cleaned()
    if model and split_revision(model)[1]:
        raise ConfigError(f"a server is found by its model, whatever its revision: -m {split_revision(model)[0]}")
    benchmark = benchmark and kept_name(benchmark)
    if model or benchmark or all:
        done = serving.stop_all(list(asked_for(serving.servers(found_on_modal()), model, benchmark)))
    if not (model or benchmark):
        dead = serving.clean()
        done = Cleaned([*done.deeds, *dead.deeds], dead.unseen)
    if json:
        print_json(done.rows())
    elif not (done.deeds or done.faults):
        talk.print("Nothing to stop: no server of a dead run is left. `modal-eval stop --all` also ends live ones.")
    for deed in done.deeds:
        if deed.outcome in ("stopped", "left alone"):
            talk.print(str(deed), soft_wrap=True)
    for fault in done.faults:
        complain(fault)
    return EXIT_FAILED if done.faults else EXIT_DONE


def asked_for(found: Sequence[Server], model: str | None, benchmark: str | None) -> Iterator[Server]:
    """Those of `model` and `benchmark`, each with the leases that these name; all of ours where neither is given."""
    for server in found:
        if orphan := server.orphan:
            if orphan.ours and (model is None or orphan.serves(model)) and benchmark in (None, orphan.benchmark):
                yield server
            continue
        named = [one for one in server.leases if model in (None, one.model) and benchmark in (None, benchmark_of(one))]
        left_alone = benchmark is not None or model not in (None, server.model)
        if named or not left_alone:
            yield replace(server, leases=tuple(named), processes=() if left_alone else server.processes)
