"""Runs in lm-eval's environment: loads jobs as the adapter would, and says what came of each.

A JSON list of job lines on standard input, one JSON list as the last line of standard output.
"""

import importlib.util
import json
import sys
from pathlib import Path

ADAPTER = Path(__file__).resolve().parents[2] / "src" / "modal_eval" / "harnesses" / "adapters" / "run.py"


def load_adapter():
    """The adapter's own way to make our code importable."""
    spec = importlib.util.spec_from_file_location("adapter_run", ADAPTER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(adapter, line):
    from modal_eval.harnesses.adapters.channel import plain
    from modal_eval.harnesses.adapters.common import Job, describe_data
    from modal_eval.harnesses.adapters.lm_eval_harness_model import Asker

    job = Job.from_line(line)
    try:
        backend = adapter.load_backend(job)
    except Exception as error:  # noqa: BLE001 - the test asserts on the words
        return {"error": f"{type(error).__name__}: {error}"}
    asker = Asker(job, backend._model)
    instances = [backend._loaded.instances[wanted] for wanted in backend._loaded.wanted]
    examples = [[each.example_id, each.task, each.info["doc_id"]] for each in backend.examples]
    return plain(
        {
            "api": backend.api,
            "examples": examples,
            "prompts": [each.prompt for each in backend.examples],
            "data": describe_data(job, backend),
            "sha256": backend.environment_sha256,
            "payloads": [asker.payload(group[0], nth) for group in instances[:2] for nth in range(2)],
        }
    )


def main():
    lines = json.loads(sys.stdin.read())
    adapter = load_adapter()
    replies = [load(adapter, line) for line in lines]
    print("\n" + json.dumps(replies))


if __name__ == "__main__":
    main()
