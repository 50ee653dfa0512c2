"""Runs in a harness's environment: scores given answers with a shipped environment, as the adapter would.

One JSON request on standard input, one JSON reply as the last line of standard output. A request with `loads`, a list of
`[env_id, env_args]`, only loads each of them.
"""

import asyncio
import importlib.util
import json
import sys
from pathlib import Path

ADAPTER = Path(__file__).resolve().parents[2] / "src" / "modal_eval" / "harnesses" / "adapters" / "run.py"


def load_adapter():
    """The adapter's own way to make our code importable; processes that multiprocessing spawns need it, too."""
    spec = importlib.util.spec_from_file_location("adapter_run", ADAPTER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.add_environment_paths([])


load_adapter()


async def score(environment, row, text):
    from verifiers.types import State

    state = State(input=dict(row))
    state.update(
        prompt=row["prompt"],
        completion=[{"role": "assistant", "content": text}],
        answer=row["answer"],
        info=row.get("info") or {},
        trajectory=[],
        timing={"scoring_ms": 0, "total_ms": 0, "generation_ms": 0, "start_time": 0},
    )
    await environment.rubric.score_rollout(state)
    return {"reward": state["reward"], "metrics": state["metrics"], "info": state.get("modal_eval_info") or {}}


def describe(env_id, env_args):
    """Rows and their source, or why there are none."""
    import verifiers as vf

    try:
        environment = vf.load_environment(env_id, **env_args)
    except Exception as error:  # noqa: BLE001 - the test asserts on the words
        return {"error": str(error.__cause__ or error)}
    return {"rows": environment.get_eval_dataset().to_list(), "data_source": environment.data_source}


async def main():
    import verifiers as vf

    request = json.loads(sys.stdin.read())
    if "loads" in request:
        print(json.dumps([describe(env_id, env_args) for env_id, env_args in request["loads"]]))
        return
    try:
        environment = vf.load_environment(request["env_id"], **request["env_args"])
    except Exception as error:  # noqa: BLE001 - the test asserts on the words
        print(json.dumps({"error": f"{error} {error.__cause__ or ''}"}))
        return
    rows = environment.get_eval_dataset().to_list()
    scores = [await score(environment, rows[index], text) for index, text in request["answers"]]
    await environment.rubric.teardown()
    kept = [{"prompt": row["prompt"], "answer": row["answer"], "info": row.get("info")} for row in rows]
    print(json.dumps({"rows": kept, "data_source": environment.data_source, "scores": scores}))


if __name__ == "__main__":
    asyncio.run(main())
