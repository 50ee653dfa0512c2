"""vLLM on Modal: the app that `modal-eval` deploys, and that `modal deploy` can deploy alone.

    MODAL_EVAL_MODEL=org/model MODAL_EVAL_BENCHMARK=gsm8k modal deploy deployments/modal_vllm.py

Modal imports this one file in the container, too, where nothing but `modal` and vLLM is installed. So the library is
imported on this side alone, and what the container has to run reaches it in its variables.
"""

import json
import os
import subprocess
import sys
import threading

import modal


def serve() -> None:
    """Start vLLM and return; Modal forwards calls once its port answers."""
    server = subprocess.Popen(json.loads(os.environ["MODAL_EVAL_COMMAND"]))
    lifetime = float(os.environ["MODAL_EVAL_LIFETIME_S"])
    threading.Thread(target=end_with, args=(server, lifetime), daemon=True).start()


def end_with(server: subprocess.Popen[bytes], lifetime_s: float) -> None:
    """End the container with its server: one that is dead but not gone would be paid for, and answer nothing."""
    try:
        said = f"vLLM exited with {server.wait(lifetime_s)}"
    except subprocess.TimeoutExpired:
        said = f"vLLM is ended after infra.lifetime={lifetime_s:g} s"
        server.kill()
    sys.stderr.write(f"{said}\n")
    sys.stderr.flush()
    os._exit(1)


if modal.is_local():
    from modal_eval.serving.modal_app import app_for

    app = app_for(serve)
