"""The janitor, as Prefect sees it: never cached, and not tried again before its next time, which is soon."""

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from modal_eval import serving
from modal_eval.config.janitor import JanitorRequest
from modal_eval.errors import ServerError
from modal_eval.serving import Cleaned
from tasks import artifacts

ARTIFACT = "janitor"


@task(name="clean", cache_policy=NO_CACHE, persist_result=False)
def clean(request: JanitorRequest) -> Cleaned:
    return serving.clean(modal=request.modal, dry=request.dry_run)


@task(name="publish", cache_policy=NO_CACHE, persist_result=False)
def publish(cleaned: Cleaned) -> None:
    """Tell what was done in the log, and in a table that the UI shows."""
    logger = get_run_logger()
    for deed in cleaned.deeds:
        logger.info("%s", deed)
    for fault in cleaned.faults:
        logger.error("%s", fault)
    if not (cleaned.deeds or cleaned.faults):
        logger.info("nothing to stop")
    rows = [*cleaned.rows(), *({"outcome": "fault", "fault": fault} for fault in cleaned.unseen)]
    artifacts.publish("table", ARTIFACT, rows, "Servers that nobody has a right to any more")


def refuse_faults(cleaned: Cleaned) -> None:
    """Raise `ServerError` when something could not be asked or stopped: it may cost money until somebody looks."""
    if cleaned.faults:
        raise ServerError(f"{len(cleaned.faults)} could not be done: {'; '.join(cleaned.faults)}")
