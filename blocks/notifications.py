"""Who is told."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.blocks.core import Block
from prefect.blocks.fields import SecretDict
from pydantic import Field


class NotificationTarget(Block):
    """Who is told when something needs a person: any services that Apprise knows, such as `slack://…` or `mailto://…`."""

    _block_type_name = "Notification Target"
    _block_type_slug = "notification-target"
    _description = "Who is told when something needs a person."

    urls: SecretDict = Field(description='Name to an Apprise URL, such as `{"chat": "slack://…"}`.')

    def notify(self, body: str, subject: str = "") -> list[str]:
        """Tell everybody; returns the names of those who could not be told, which raises nothing."""
        from apprise import Apprise  # slow to import, and few flows tell anybody anything

        failed = []
        with _silent("apprise"):  # it would log URLs, which hold keys
            for name, url in self.urls.get_secret_value().items():
                service = Apprise()
                if not (service.add(url) and service.notify(body=body, title=subject)):
                    failed.append(name)
        return failed


@contextmanager
def _silent(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
