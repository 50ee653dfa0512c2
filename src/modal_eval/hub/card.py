"""The data card of a repository of runs: one section and one loadable configuration a run."""

from __future__ import annotations

import re
from typing import Any

import yaml

from modal_eval import paths
from modal_eval.reports.tables import markdown_report

FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
INTRODUCTION = """# Evaluation runs

Each folder is one run of modal-eval: `results.jsonl` has a row a rollout, `metadata.json` the summary, `run_config.json`
everything that was set, `checkpoint.jsonl` every answer as the server gave it. Host names, paths, addresses and keys
were taken out before the upload; logs were not uploaded.
"""


def merged_card(existing: str, folder: str, metadata: dict[str, Any]) -> str:
    """The README with this run's section and configuration added or replaced; the rest stays as it is.

    The same run gives the same text, so that pushing it again changes nothing.
    """
    found = FRONT.match(existing)
    front = (yaml.safe_load(found.group(1)) if found else None) or {}
    body = existing[found.end() :] if found else existing
    return f"---\n{_front_matter(front, folder)}---\n{_with_section(body, folder, metadata)}"


def _front_matter(front: dict[str, Any], folder: str) -> str:
    name = folder.replace("/", "--")
    others = [config for config in front.get("configs") or [] if config.get("config_name") != name]
    mine = {"config_name": name, "data_files": [{"split": "test", "path": f"{folder}/{paths.RESULTS}"}]}
    configs = sorted([*others, mine], key=lambda config: str(config.get("config_name")))
    tags = sorted({*(front.get("tags") or []), "evaluation", "modal-eval"})
    return yaml.safe_dump({**front, "tags": tags, "configs": configs}, sort_keys=False, allow_unicode=True, width=1000)


def _with_section(body: str, folder: str, metadata: dict[str, Any]) -> str:
    opening, closing = f"<!-- run {folder} -->", f"<!-- end of run {folder} -->"
    section = f"{opening}\n{markdown_report(metadata)}\n\nFiles: `{folder}/`\n{closing}\n"
    known = re.compile(re.escape(opening) + ".*?" + re.escape(closing) + r"\n?", re.DOTALL)
    if known.search(body):
        return known.sub(lambda _: section, body)
    return f"{body.rstrip() or INTRODUCTION.rstrip()}\n\n{section}"
