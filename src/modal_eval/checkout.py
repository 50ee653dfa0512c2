"""Where the code of a flow run comes from: the checkout that this package stands in, at the revision that was deployed.

`prefect.yaml` names `enter` as its pull step. So no path of a machine stands in a deployment, and every node may keep its
checkout where it likes.
"""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

from modal_eval.errors import ConfigError
from modal_eval.paths import project_root

logger = logging.getLogger("prefect.flow_runs")


def enter(revision: str = "") -> dict[str, str]:
    """Make this machine's checkout the working directory of the flow run and say where it is.

    Raises `ConfigError` when it stands at another revision than the one that was deployed: numbers made by two versions of
    the code may not meet in one history. Without a `revision`, or where the checkout is no git repository, nothing is
    compared.
    """
    root = project_root()
    here = revision_of(root)
    if revision and here and here != revision:
        message = (
            f"the deployment is of revision {revision[:12]} and the checkout on this machine, {root}, is at {here[:12]}; "
            f"`git -C {root} checkout {revision[:12]}` and start its worker again, or deploy anew: `prefect --no-prompt "
            "deploy --all`"
        )
        # Prefect shows of a pull step that fails no word; this logger's lines it shows
        logger.error(message, extra={"flow_run_id": os.environ.get("PREFECT__FLOW_RUN_ID")})
        raise ConfigError(message)
    os.chdir(root)
    return {"directory": str(root)}


def stand() -> dict[str, str]:
    """The revision that is deployed: `prefect.yaml` names it as its build step."""
    return {"revision": revision_of(project_root()) or ""}


def revision_of(root: Path) -> str | None:
    """The commit that a checkout stands at; `None` where git does not know it."""
    asked = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None if asked.returncode == 0 else None
