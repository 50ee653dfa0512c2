"""Prefect's view of each stage: name, retries, timeout, cache policy. The work itself is in `modal_eval.stages`."""
