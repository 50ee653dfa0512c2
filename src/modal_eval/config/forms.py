"""The JSON schema of a section as a form: what nobody fills in is not sent."""

from __future__ import annotations

from typing import Any


def unfilled(schema: dict[str, Any]) -> None:
    """Take out of an object's schema, in place, every default, and the null beside a type.

    A form that Prefect's UI makes from a schema sends the defaults it finds there: each setting of a benchmark would be
    overridden by what nobody has typed. And it shows a choice between a type and null as two tabs.
    """
    for name, field in schema.get("properties", {}).items():
        field.pop("default", None)
        others = [one for one in field.get("anyOf", []) if one.get("type") != "null"]
        if len(others) == 1 and len(others) < len(field["anyOf"]):
            del field["anyOf"]
            for key, value in others[0].items():
                field.setdefault(key, value)
        field["title"] = name
