"""Prefect's view of each stage: name, retries, timeout, cache policy. The work itself is in `modal_eval.stages`."""

import logging

logging.getLogger("modal_eval").setLevel(logging.INFO)  # Prefect's handlers show what the library says, if it says it
