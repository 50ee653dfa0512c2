"""lm-eval's own client (`local-chat-completions`) over the prompts of a file. Runs in lm-eval's environment."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion

parser = argparse.ArgumentParser()
parser.add_argument("base_url")
parser.add_argument("prompts")
parser.add_argument("concurrent", type=int)
given = parser.parse_args()
model = LocalChatCompletion(
    base_url=f"{given.base_url}/chat/completions",
    model="stub",
    num_concurrent=given.concurrent,
    tokenized_requests=False,
)
requests = [
    Instance(
        "generate_until", {}, (model.apply_chat_template([{"role": "user", "content": prompt}]), {"max_gen_toks": 768}), number
    )
    for number, prompt in enumerate(json.loads(Path(given.prompts).read_text(encoding="utf-8")))
]  # fmt: skip
print(len(model.generate_until(requests)))
