"""`modal-eval benchmarks`: what can be evaluated."""

from __future__ import annotations

from rich.table import Table

from modal_eval.cli.options import Json
from modal_eval.cli.output import data, print_json
from modal_eval.config.load import benchmark_files, load_benchmark
from modal_eval.errors import EXIT_DONE


def command(*, json: Json = False) -> int:
    """List the benchmarks and their defaults."""
    found = [load_benchmark(name) for name in benchmark_files()]
    if json:
        print_json([benchmark.model_dump(mode="json") for benchmark in found])
        return EXIT_DONE
    table = Table(
        "benchmark", "env_id", "GPU", "rollouts", "temperature", "max_tokens", "what", box=None, pad_edge=False
    )
    for one in found:
        sampling = one.sampling
        table.add_row(
            one.name, one.env_id, one.infra.gpu, str(one.eval.rollouts), str(sampling.temperature),
            str(sampling.max_tokens), one.description,
        )  # fmt: skip
    data.print(table)
    return EXIT_DONE
