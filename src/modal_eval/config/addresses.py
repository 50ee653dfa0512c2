"""Addresses of endpoints, checked when a configuration is read: from then on they are written down and shown."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

URL = r"https?://(\[[0-9A-Fa-f:.]+\]|[^\s\[\]/?#@:,\\]+)(:[0-9]{1,5})?(/[^\s?#@,\\]*)?"
URLS = rf"^$|^[\s,]*{URL}(\s*,[\s,]*{URL})*[\s,]*$"
HIGHEST_PORT = 65_535
TOLD_TOO_MUCH = (
    "infra.base_url holds a user, a password or a query, and a configuration is written down; give http://HOST:PORT/v1 alone, "
    "put the key into a variable and name it: --infra.api_key_env=NAME"
)


def urls_of(value: str | None) -> list[str]:
    """The addresses of replicas, which are given with commas between."""
    return [url for one in (value or "").split(",") if (url := one.strip())]


def checked_urls(value: str) -> str:
    """Refuse what is no list of HTTP URLs. What may hold a secret is never quoted, however little of a URL it is."""
    if any(sign in value for sign in "@?#"):
        raise ValueError(TOLD_TOO_MUCH)
    if not re.fullmatch(URLS, value):
        raise ValueError(f"infra.base_url={value} is no URL; write http://HOST:PORT/v1, replicas with commas between")
    if ports := [port for _, port, _ in re.findall(URL, value) if int(port[1:] or 0) > HIGHEST_PORT]:
        raise ValueError(f"infra.base_url={value} has the port {ports[0][1:]}, and the highest is {HIGHEST_PORT}")
    return value


Endpoints = Annotated[
    str,
    AfterValidator(checked_urls),
    # The form of a deployment: Prefect keeps the parameters of a run that it takes, and quotes the value that a `pattern`
    # refuses. What a `const` refuses it does not quote.
    Field(
        json_schema_extra={
            "if": {"not": {"pattern": URLS}},
            "then": {"const": "a URL such as http://HOST:PORT/v1, without a user, a password or a query"},
        }
    ),
]
"""One URL or several; in a JSON schema refused without being quoted."""
