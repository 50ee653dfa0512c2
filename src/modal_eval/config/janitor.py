"""What the janitor is asked to do."""

from __future__ import annotations

from modal_eval.config.models import Section


class JanitorRequest(Section):
    """Which servers to look at, and whether to stop those that nobody has a right to any more."""

    modal: bool = True
    """Look at the apps on Modal too, where an account is configured on the machine that does the work."""
    dry_run: bool = False
    """Only tell what would be stopped."""
