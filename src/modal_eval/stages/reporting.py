"""Report: from rows to numbers. Pure but for the file it writes; may be repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modal_eval import paths
from modal_eval.config.models import RunConfig
from modal_eval.reports.draws import reported_ks
from modal_eval.reports.summary import summarize
from modal_eval.results.files import read_json, write_json
from modal_eval.results.run_folder import Run, now
from modal_eval.stages.generating import known_rows, wanted_rollouts
from modal_eval.stages.preparing import read_prepared


def report(run_dir: Path) -> dict[str, Any]:
    """Write `metadata.json` and return it."""
    run = Run.load(run_dir)
    model, prepared = read_prepared(run_dir)
    meta = read_json(run_dir / paths.CHECKPOINT_META)
    rows = known_rows(run_dir)
    usage = [row.get("usage") or {} for row in rows.values()]
    seconds = meta.get("stage_seconds") or {}
    described = read_json(run_dir / paths.RUN_CONFIG)
    summary = summarize(
        run.config,
        [rows[key] for key in sorted(rows)],
        total_rollouts=len(wanted_rollouts(run_dir)),
        facts={
            "time_ms": round(seconds.get("generate", 0.0) * 1000, 2),
            "tokens": {
                "prompt": sum(one.get("prompt_tokens") or 0 for one in usage),
                "completion": sum(one.get("completion_tokens") or 0 for one in usage),
            },
            "stage_seconds": seconds,
            **cost(run.config, described.get("held") or [], seconds.get("generate", 0.0)),
            "calls": meta.get("calls") or {},
            "harness": prepared["harness"],
            "environment": prepared["environment"],
            "data": prepared["data"],
            "server": described.get("server"),
            "scorer": scorer(run.config, prepared),
            "model_revision": model.revision or model.digest,
            "model_step": model.step,
            "model_stage": model.stage,
            "chat_template": {"source": model.chat_template_source, "sha256": model.chat_template_sha256},
            "identity_sha256": described.get("identity_sha256"),
            "run_id": run.run_id,
            "benchmark": run.config.name,
            "finished_at": now(),
            **harness_results(run, len(wanted_rollouts(run_dir))),
        },
    )
    write_json(run_dir / paths.METADATA, summary)
    return summary


def harness_results(run: Run, total_rollouts: int) -> dict[str, Any]:
    """The harness's own numbers under its name, unless they are of an earlier run over fewer or more rollouts."""
    path = run.run_dir / paths.HARNESS_RESULTS
    results = read_json(path) if path.is_file() else {}
    return {run.config.eval.harness: results} if results.pop("rollouts", None) == total_rollouts else {}


def scorer(config: RunConfig, prepared: dict[str, Any]) -> dict[str, Any]:
    """Who made these numbers, and with what; an argument that is `None` was left to the environment's default."""
    return {
        "harness": prepared["harness"],
        "environment": prepared["environment"],
        "args": {name: config.env_args.get(name) for name in config.scoring_args},
        "k": reported_ks(config),
        "scored_at": now(),
    }


def cost(config: RunConfig, held: list[dict[str, Any]], generated_s: float) -> dict[str, float | None]:
    """GPU-seconds that the run held, and their price; `None` where no GPU of ours was held or no price is known.

    `held` names the GPUs of one server after the other. Each is paid for from its lease until it answered, and for what was
    generated before the next one came, or at all, which is `generated_s`.
    """
    if not any(one["gpus"] for one in held):
        return {"gpu_seconds": None, "cost": None}
    ends = [*(one["generated_s"] for one in held[1:]), generated_s]
    seconds = sum(
        one["gpus"] * (one["starting_s"] + end - one["generated_s"]) for one, end in zip(held, ends, strict=True)
    )
    price = config.infra.gpu_hour_price
    return {"gpu_seconds": round(seconds, 1), "cost": None if price is None else round(seconds / 3600 * price, 4)}
