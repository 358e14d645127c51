"""The JSON Schema that editors use: current, and right about the files that exist."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from lbstudy.methods.configure import full_study_class
from lbstudy.study.file import StudyFile
from lbstudy.study.schema import file_schema

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "search_spaces/study.schema.json"
STUDIES = [*(ROOT / "search_spaces").glob("*.yaml"), ROOT / "lbstudy/console/first_study.yaml"]
RESOLVED = list((ROOT / "docs/results").rglob("study.yaml"))


@pytest.fixture(scope="module")
def schema():
    return json.loads(SHIPPED.read_text())


def faults(schema, content):
    return [f"{'.'.join(map(str, e.path))}: {e.message}" for e in Draft202012Validator(schema).iter_errors(content)]


def test_the_shipped_schema_is_current(schema):
    assert schema == file_schema(full_study_class()), "lbstudy schema > search_spaces/study.schema.json"


@pytest.mark.parametrize("path", STUDIES + RESOLVED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_studies_fit_the_schema(schema, path):
    assert not faults(schema, StudyFile(path).content)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_studies_name_the_schema_beside_them(path):
    first = path.read_text().splitlines()[0]
    assert first == f"# yaml-language-server: $schema={SHIPPED.name}"


@pytest.mark.parametrize(("key", "value", "where"), [
    ("model", 3, "model"),
    ("budget", {"epoch": 3}, "budget"),
    ("modle", "lenet5", ""),
    ("search", {"learning_rate": {"log_uniform": [1]}}, "search.learning_rate"),
    ("search", {"learning_rate": {"log_uniform": [1e-3, 1], "when": {"batch_size": "x"}}}, "search.learning_rate"),
    ("tuning", {"sampler": "tpe"}, "tuning"),
])  # fmt: skip
def test_the_schema_sees_what_is_wrong(schema, key, value, where):
    content = deepcopy(StudyFile(ROOT / "search_spaces/digits.yaml").content)
    content[key] = value
    assert [fault.split(":")[0] for fault in faults(schema, content)] == [where]


def test_factors_are_in_the_schema(schema, tmp_path):
    text = (ROOT / "docs/study-file.md").read_text().split("### Factors")[1].split("```yaml\n")[1].split("```")[0]
    (tmp_path / "factors.yaml").write_text(text)
    assert not faults(schema, StudyFile(tmp_path / "factors.yaml").content)
