"""A server that already runs: is it there, does it know the model, what does it say of itself?"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from typing import Any

import httpx

from modal_eval.config.addresses import urls_of
from modal_eval.config.load import nearest
from modal_eval.config.models import RunConfig
from modal_eval.errors import ConfigError, ServerError
from modal_eval.records import PreparedModel, ServerHandle

TIMEOUT_S = 30.0
POLL_S = 1.0
LOADING = (httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT)


def check_endpoint(config: RunConfig, model: PreparedModel, *, say: Callable[[str], None]) -> ServerHandle:
    """Ask every replica of the endpoint for its models; one that is still loading has `infra.startup_timeout`.

    Raises `ServerError` or `ConfigError` in one line.
    """
    urls = tuple(url.rstrip("/") for url in urls_of(config.infra.base_url))
    key = endpoint_key(config.infra.api_key_env)
    deadline = time.monotonic() + config.infra.startup_timeout
    for url in urls:
        known = _models(url, key, deadline, say)
        if known and model.served_name not in known:
            raise ConfigError(
                f"{url} does not serve '{model.served_name}' but {', '.join(known[:8])}.{nearest(model.served_name, known)} "
                "Give the served name as -m"
            )
    return ServerHandle(
        urls, model.served_name, "endpoint", None, config.infra.api_key_env,
        server_facts(urls[0].removesuffix("/v1"), model.served_name, key),
    )  # fmt: skip


def endpoint_key(name: str | None) -> str | None:
    """The key from the environment variable `name`. Raises `ConfigError` when the variable is not set."""
    if name is None:
        return None
    if not (key := os.environ.get(name)):
        raise ConfigError(f"infra.api_key_env={name}, but that environment variable is not set; export it with the key")
    return key


def _models(url: str, key: str | None, deadline: float, say: Callable[[str], None]) -> list[str]:
    """The names that the endpoint lists; none when it cannot list them, which some gateways cannot."""
    answer = _first_answer(url, key, deadline, say)
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise ServerError(
            f"{url} refuses us ({answer.status_code}); name the variable that holds its key: --infra.api_key_env=NAME"
        )
    if answer.status_code != httpx.codes.OK:
        return []
    try:
        return [str(one["id"]) for one in answer.json().get("data", [])]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ServerError(
            f"{url}/models answered something that is no list of models; is it an OpenAI-compatible base ending in /v1?"
        ) from None


def _first_answer(url: str, key: str | None, deadline: float, say: Callable[[str], None]) -> httpx.Response:
    """Wait for a server that is loading, or is being woken: it is silent, or answers 502 to 504."""
    told = False
    while True:
        try:
            answer = httpx.get(f"{url}/models", headers=_headers(key), timeout=TIMEOUT_S, follow_redirects=True)
            if answer.status_code not in LOADING:
                return answer
            seen = f"answers {answer.status_code}"
        except httpx.ReadTimeout:
            seen = f"was silent for {TIMEOUT_S:g} s"
        except (httpx.TransportError, httpx.TooManyRedirects, httpx.InvalidURL) as error:
            raise ServerError(
                f"{url} does not answer ({type(error).__name__}: {error}); is the server running?"
            ) from error
        if time.monotonic() > deadline:
            raise ServerError(f"{url} {seen}, and infra.startup_timeout is over; look at the server's own log")
        if not told:
            say(f"waiting for {url}: it {seen}")
            told = True
        time.sleep(POLL_S)


def server_facts(root: str, model: str, key: str | None = None) -> dict[str, Any]:
    """What the server says of itself, as far as its kind says anything: version, context length, chat template."""
    facts: dict[str, Any] = {}
    with httpx.Client(headers=_headers(key), timeout=TIMEOUT_S) as client:
        listed = _json(client, f"{root}/v1/models").get("data") or []
        mine = next((one for one in listed if isinstance(one, dict) and one.get("id") == model), {})
        facts["max_model_len"] = mine.get("max_model_len") or (mine.get("meta") or {}).get("n_ctx")
        facts["owned_by"] = mine.get("owned_by")
        root_model = mine.get("root")
        facts["model_root"] = None if str(root_model).startswith(("/", "~")) else root_model  # a path says nothing
        facts["version"] = _json(client, f"{root}/version").get("version")
        properties = _json(client, f"{root}/props")
        facts["version"] = facts["version"] or properties.get("build_info")
        if template := properties.get("chat_template"):
            facts["chat_template_sha256"] = hashlib.sha256(str(template).encode()).hexdigest()
    return {name: value for name, value in facts.items() if value is not None}


def _json(client: httpx.Client, url: str) -> dict[str, Any]:
    """An optional page of the server; most servers have only some of them."""
    try:
        answer = client.get(url)
        found = answer.json() if answer.status_code == httpx.codes.OK else {}
    except (httpx.TransportError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}
