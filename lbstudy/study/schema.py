"""The JSON Schema of the study file, for editors: that of the spec, and what a file may write shorter."""

from __future__ import annotations

from typing import Any

from lbstudy.study.spec import StudySpec

OR_A_FACTOR = ("model", "dataset", "budget")
"""Required keys that may be factors of the cells instead, which no schema can tell."""


def file_schema(study_class: type[StudySpec]) -> dict[str, Any]:
    """The schema of the files of a study: a model may be its name alone, one range or value stands for a list of one.

    Args:
        study_class: knows what may be fixed.
    """
    schema = study_class.model_json_schema(by_alias=True)
    parts = schema["$defs"]
    parts["ModelSpec"] = {"anyOf": [{"type": "string"}, parts["ModelSpec"]]}
    condition = parts["Condition"]
    condition["properties"] = {name: _or_one(entry) for name, entry in condition["properties"].items()}
    for mapping in (condition, schema["properties"]["search"]):
        mapping["additionalProperties"] = _or_one(mapping["additionalProperties"])
    schema["required"] = [name for name in schema["required"] if name not in OR_A_FACTOR]
    return schema


def _or_one(several: dict[str, Any]) -> dict[str, Any]:
    """A list, or the only entry of one."""
    return {"anyOf": [several["items"], several]}
