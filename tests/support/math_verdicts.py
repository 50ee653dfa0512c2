"""Runs in a harness's environment: what math-verify says of pairs of answers, called directly, and what our checker says.

`{"pairs": [[reference, response], …], "texts": bool}` on standard input; one JSON list as the last line of output, with
`direct` (math-verify's parse and verify in the main thread, with its own limits) and `ours` for each pair. With `texts` the
direct verdict reads both as whole texts, as math-verify's own tests do, and not as the content of a box.
"""

import asyncio
import json
import sys
import time

from tests.support.score_answers import load_adapter

load_adapter()

from math_verify import parse, verify  # noqa: E402 - importable only now

from modal_eval.harnesses.envkit.checker import Checker  # noqa: E402


async def ours(pairs):
    check = Checker()

    async def timed(reference, response):
        verdict = await check(response, reference)
        return verdict, time.monotonic()

    try:
        return await asyncio.gather(*(timed(*pair) for pair in pairs))
    finally:
        await check.close()


def main():
    request = json.loads(sys.stdin.read())
    shape = "{}" if request.get("texts") else "\\boxed{{{}}}"
    direct = [verify(*(parse(shape.format(each)) for each in pair)) for pair in request["pairs"]]
    checked = asyncio.run(ours(request.get("ours", request["pairs"])))
    print(json.dumps({"direct": direct, "ours": [verdict for verdict, _ in checked], "at": [at for _, at in checked]}))


main()
