"""What a server's GPUs cost: what the user says, else for Modal's types an estimate, else nothing is said."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from modal_eval.config.models import RunConfig
from modal_eval.errors import ConfigError

PER_SECOND: Mapping[str, float] = {
    "T4": 0.000164,
    "L4": 0.000222,
    "A10": 0.000306,
    "L40S": 0.000542,
    "A100-40GB": 0.000583,
    "A100-80GB": 0.000694,
    "RTX-PRO-6000": 0.000842,
    "H100": 0.001097,
    "H200": 0.001261,
    "B200": 0.001736,
}
"""Dollars a second of one GPU, as Modal's public list had them in May 2026, without processors, memory and regional
surcharges: an estimate. `MODAL_EVAL_GPU_PRICES=H100=0.0012,L4=0.0002` corrects or adds to it."""
VARIABLE = "MODAL_EVAL_GPU_PRICES"
ALIASES = {"A100": "A100-40GB", "A10G": "A10"}


@dataclass(frozen=True, slots=True)
class Price:
    """The GPUs of a server, and what all of them cost an hour. `None` where nobody says."""

    gpus: int = 0
    gpu: str = ""
    """Modal's name of their type; empty for GPUs of one's own."""
    an_hour: float | None = None
    is_estimate: bool = False


UNKNOWN = Price()


def price_of(config: RunConfig, gpus: int) -> Price:
    """What `gpus` GPUs of the server that `config` asks for cost. Raises `ConfigError` as `per_second` does."""
    kind = config.infra.gpu.partition(":")[0] if config.infra.target == "modal" else ""
    if gpus == 0:
        return Price(0, kind)
    if (given := config.infra.gpu_hour_price) is not None:
        return Price(gpus, kind, given * gpus)
    return estimate(kind, gpus)


def estimate(kind: str, gpus: int) -> Price:
    """The price of `gpus` GPUs of Modal's type `kind` by the list; without a price for a type that is not on it."""
    second = per_second(kind)
    return Price(gpus, kind, None if second is None else second * 3600 * gpus, second is not None)


def per_second(kind: str) -> float | None:
    """Dollars a second of one GPU of Modal's type `kind`; `!` and `+` behind it say only how Modal may choose.

    Raises `ConfigError` when `MODAL_EVAL_GPU_PRICES` cannot be read.
    """
    name = kind.strip().rstrip("!+").upper()
    name = ALIASES.get(name, name)
    return {**PER_SECOND, **corrections(os.environ.get(VARIABLE, ""))}.get(name)


def corrections(text: str) -> dict[str, float]:
    """`H100=0.0012,L4=0.0002` as a table. Raises `ConfigError` for anything else."""
    found = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, number = part.partition("=")
        try:
            price = float(number)
        except ValueError:
            price = -1.0
        if not name.strip() or not price >= 0:
            raise ConfigError(
                f"{VARIABLE}: '{part}' is no TYPE=DOLLARS_A_SECOND; write it as in {VARIABLE}=H100=0.0011"
            )
        found[ALIASES.get(name.strip().upper(), name.strip().upper())] = price
    return found
