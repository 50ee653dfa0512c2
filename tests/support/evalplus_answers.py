"""Runs in EvalPlus's environment: finds the code in answers side by side, as the adapter does.

`{"answers": [text, …], "processes": N, "limit_s": seconds}` on standard input; one JSON object as the last line of output, with
each answer's `solutions` (null for one that took too long) and how many `processes` there were in the end.
"""

import asyncio
import json
import multiprocessing
import sys

from tests.support.score_answers import load_adapter

load_adapter()

from modal_eval.harnesses.adapters.evalplus_sanitizers import Sanitizers  # noqa: E402 - importable only now


async def main():
    request = json.loads(sys.stdin.read())
    sanitizers = Sanitizers(request["processes"], request["limit_s"])

    async def solution(text):
        try:
            return (await sanitizers.extract(text, "f")).solution.strip()
        except TimeoutError:
            return None

    try:
        solutions = await asyncio.gather(*map(solution, request["answers"]))
        print(json.dumps({"solutions": solutions, "processes": len(multiprocessing.active_children())}))
    finally:
        sanitizers.close()


if __name__ == "__main__":
    asyncio.run(main())
