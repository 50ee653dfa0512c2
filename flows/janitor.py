"""Servers that nobody has a right to any more, stopped wherever they are."""

from typing import Any

from prefect import flow

from modal_eval.config.janitor import JanitorRequest
from tasks.accounts import in_the_name_of
from tasks.janitor import clean, publish, refuse_faults


@flow(name="janitor")
def janitor(
    request: JanitorRequest = JanitorRequest(),  # noqa: B008 - frozen
    modal_account: str | None = None,
) -> list[dict[str, Any]]:
    """End servers whose holder is dead or whose deadline has passed, and what dead runs left on GPUs.

    Looks at the machine that runs this flow, and at Modal. A fault at one server keeps it from no other; it is told in the
    end, and then the flow has failed. Returns a row for each server that was stopped or could not be.

    Args:
        request: What to look at.
        modal_account: Name of a Modal Account block, in place of the worker's own login.
    """
    with in_the_name_of(modal_account, None):
        cleaned = clean(request)
    publish(cleaned)
    refuse_faults(cleaned)
    return cleaned.rows()
