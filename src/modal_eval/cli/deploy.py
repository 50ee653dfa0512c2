"""`modal-eval deploy`: a server without a run, on Modal or here."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Annotated, Any

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
    dry_run: Annotated[bool, Parameter(name="--dry-run", help="Print the configuration; start nothing.")] = False,
    json: Json = False,
    overrides: Settings = None,
) -> int:
    """Start a model's server as a benchmark configures it, on Modal unless `infra.target` is local or node, and print its
    URL.

    Runs with the same model and server settings share it and do not stop it: `modal-eval stop` does, and after
    `infra.lifetime` whoever comes first. Without a call for `infra.scaledown_window` seconds Modal takes its GPU back; the
    next call brings it again. A server of this machine has its GPU all the time.
    """
    given = typed(overrides)
    config = deployable(model, benchmark, given)
    if dry_run:
        return show(config, as_json=json)
    on_modal = config.infra.target == "modal"
    if on_modal:
        serving.require_modal()
    prepared = resolve_model(config)
    lease = serving.deploy(config, prepared, say=lambda text: talk.print(text, soft_wrap=True))
    facts = {
        "app": lease.app, "url": f"{lease.url}/v1", "model": prepared.served_name, "revision": prepared.revision,
        "key_file": str(serving.key_path(lease.app)) if on_modal else None, "deadline": lease.deadline,
    }  # fmt: skip
    if json:
        print_json(facts)
        return EXIT_DONE
    data.print(facts["url"], soft_wrap=True)
    needs = f"; calls need the key in {facts['key_file']}" if on_modal else ""
    talk.print(
        f"{lease.app} serves {prepared.served_name} until {moment(lease.deadline or 0)}{needs}.\n"
        f"`{run_command(config, model, benchmark, given)}` uses it, `modal-eval stop -m {model}` ends it.",
        soft_wrap=True,
    )
    return EXIT_DONE


def deployable(model: str, benchmark: str, overrides: Overrides) -> RunConfig:
    """The configuration, with Modal as its target unless the command line names another one.

    Raises `ConfigError` for an endpoint, which is somebody else's, and for `auto`.
    """
    given = overrides.model_dump(exclude_unset=True)
    if (target := given.setdefault("infra", {}).setdefault("target", "modal")) == "endpoint":
        raise ConfigError("infra.target=endpoint: an endpoint runs already; deploy with modal, local or node")
    if target == "auto":
        raise ConfigError("infra.target=auto: a server that stays has one place; deploy with modal, local or node")
    return resolve(model, load_benchmark(benchmark), Overrides.model_validate(given))


def run_command(config: RunConfig, model: str, benchmark: str, overrides: Overrides) -> str:
    """The run that asks for the server of `config`: a setting that it left out could make it ask for another one."""
    held = load_benchmark(benchmark).model_dump(mode="json")
    given = overrides.model_dump(mode="json", exclude_unset=True)
    infra = {**given.pop("infra", {}), "target": config.infra.target}
    words = ["modal-eval", "run", "-m", model, "-b", benchmark, f"--infra.target={infra.pop('target')}"]
    for section, values in {"infra": infra, **given}.items():
        if section in ("infra", "vllm", "eval"):  # the others are no server's
            words += options({key: value for key, value in values.items() if value != held[section][key]}, section)
    return shlex.join(words)


def options(values: dict[str, Any], prefix: str) -> Iterator[str]:
    """Settings as they are typed behind a command: `--infra.lifetime=600`."""
    for key, value in values.items():
        name = f"{prefix}.{key}"
        if name == "vllm.extra_args":
            yield from options(value, name)
        elif isinstance(value, list) and not prefix.startswith("vllm.extra_args"):
            yield f"--{name}={','.join(map(str, value)) or '[]'}"
        else:
            yield f"--{name}={value if isinstance(value, str) else json.dumps(value)}"


def show(config: RunConfig, *, as_json: bool) -> int:
    if as_json:
        print_json(config.model_dump(mode="json"))
        return EXIT_DONE
    data.print_json(config.model_dump_json(include={"model", "infra", "vllm"}))
    place = f"Modal ({config.infra.gpu})" if config.infra.target == "modal" else "this machine"
    data.print(
        f"Would deploy {config.infra.engine} with {config.model} on {place}. Nothing was started.", soft_wrap=True
    )
    return EXIT_DONE
