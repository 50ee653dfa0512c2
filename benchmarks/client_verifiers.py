"""verifiers' own client and runner over the prompts of a file. Runs in verifiers' environment."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "environments"))

import prompts_env
import verifiers as vf

parser = argparse.ArgumentParser()
parser.add_argument("base_url")
parser.add_argument("prompts")
parser.add_argument("concurrent", type=int)
given = parser.parse_args()
os.environ["STUB_KEY"] = "none"
results = prompts_env.load_environment(given.prompts).evaluate_sync(
    vf.ClientConfig(api_base_url=given.base_url, api_key_var="STUB_KEY"), "stub",
    sampling_args={"temperature": 0.0, "max_tokens": 768}, max_concurrent=given.concurrent,
)  # fmt: skip
print(len(results["outputs"]))
