"""`modal-eval deploy`: a server on Modal without a run."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from modal_eval import serving
from modal_eval.checkpoints import resolve_model
from modal_eval.cli.options import Benchmark, Json, Model, Settings, typed
from modal_eval.cli.output import data, print_json, talk
from modal_eval.cli.status import moment
from modal_eval.config.load import load_benchmark, resolve
from modal_eval.config.models import Overrides, RunConfig
from modal_eval.errors import EXIT_DONE, ConfigError


def command(
    *,
    model: Model,
    benchmark: Benchmark,
    dry_run: Annotated[
        bool, Parameter(name="--dry-run", help="Print the configuration; ask Modal for nothing.")
    ] = False,
    json: Json = False,
    overrides: Settings = None,
) -> int:
    """Deploy a model's server on Modal, as a benchmark configures it, and print its URL.

    Runs with the same model and server settings share it and do not stop it: `modal-eval stop` does, and after
    `infra.lifetime` whoever comes first. Without a call for `infra.scaledown_window` seconds Modal takes its GPU back; the
    next call brings it again.
    """
    config = on_modal(model, benchmark, typed(overrides))
    if dry_run:
        return show(config, as_json=json)
    serving.require_modal()
    prepared = resolve_model(config)
    lease = serving.deploy(config, prepared, say=lambda text: talk.print(text, soft_wrap=True))
    facts = {
        "app": lease.app, "url": f"{lease.url}/v1", "model": prepared.served_name, "revision": prepared.revision,
        "key_file": str(serving.key_path(lease.app)), "deadline": lease.deadline,
    }  # fmt: skip
    if json:
        print_json(facts)
        return EXIT_DONE
    data.print(facts["url"], soft_wrap=True)
    talk.print(
        f"{lease.app} serves {prepared.served_name} until {moment(lease.deadline)}; calls need the key in {facts['key_file']}.\n"
        f"`modal-eval run -m {model} -b {benchmark} --infra.target=modal` uses it, `modal-eval stop -m {model}` ends it.",
        soft_wrap=True,
    )
    return EXIT_DONE


def on_modal(model: str, benchmark: str, overrides: Overrides) -> RunConfig:
    """The configuration with Modal as its target. Raises `ConfigError` when the command line names another one."""
    given = overrides.model_dump(exclude_unset=True)
    if (target := given.setdefault("infra", {}).setdefault("target", "modal")) != "modal":
        raise ConfigError(
            f"infra.target={target}: `modal-eval deploy` is for Modal; a server elsewhere lives with its run"
        )
    return resolve(model, load_benchmark(benchmark), Overrides.model_validate(given))


def show(config: RunConfig, *, as_json: bool) -> int:
    if as_json:
        print_json(config.model_dump(mode="json"))
        return EXIT_DONE
    data.print_json(config.model_dump_json(include={"model", "infra", "vllm"}))
    data.print(
        f"Would deploy vLLM with {config.model} on Modal ({config.infra.gpu}). Nothing was started.", soft_wrap=True
    )
    return EXIT_DONE
