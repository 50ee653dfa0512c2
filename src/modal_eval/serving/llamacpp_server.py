"""llama.cpp's own server, from the xllamacpp package; run by the Python of its environment, which has nothing of ours.

`python llamacpp_server.py --model FILE.gguf --port PORT --alias NAME`; answers on 127.0.0.1 until SIGTERM.
"""

import argparse
import signal
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--slots", type=int, default=4, help="calls at a time")
    parser.add_argument("--context", type=int, default=2048, help="tokens per slot")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-prefix-caching", action="store_true", help="compute every prompt whole")
    parser.add_argument("--chat-template-file", type=Path, help="in place of the model's own")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends at once; a graceful end waits for the longest answer

    import xllamacpp  # type: ignore[import-not-found]  # after the arguments: a wrong one is answered at once

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.model_alias = {options.alias}
    params.hostnames = ["127.0.0.1"]
    params.port = options.port
    params.n_parallel = options.slots
    params.n_ctx = options.context * options.slots
    params.kv_unified = False  # each slot has its own context, so a long neighbour takes nothing away
    params.cpuparams.n_threads = options.threads
    params.cpuparams_batch.n_threads = options.threads
    params.sampling.seed = options.seed
    params.endpoint_metrics = True
    params.cont_batching = True
    params.warmup = True
    if options.no_prefix_caching:  # a prompt that is computed in other pieces can end in another token
        params.cache_prompt = False
        params.cache_ram_mib = 0
    if options.chat_template_file:
        params.chat_template = options.chat_template_file.read_text(encoding="utf-8")
    try:
        server = xllamacpp.Server(params)
    except Exception as error:  # noqa: BLE001 - whatever it is, it goes into the log as the last line
        sys.stderr.write(f"llama.cpp does not start: {type(error).__name__}: {error}\n")
        return 1
    sys.stderr.write(f"listening on {server.listening_address}\n")
    sys.stderr.flush()
    signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
