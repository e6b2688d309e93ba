"""The table of real trainers is of the last `make test-trainers`, of its versions and of its tests."""

import ast
import re
from pathlib import Path

import pytest

from benchmarks import report, trainers

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "integrations" / "README.md"
LINES = trainers.load(trainers.FILE)
FILES = {
    "verl": ("test_verl.py", "verl.txt"),
    "lightning": ("test_lightning.py", "verl.txt"),
    "deepspeed": ("test_deepspeed.py", "verl.txt"),
    "ms-swift": ("test_swift.py", "swift.txt"),
}


def test_the_table_is_of_the_outcomes() -> None:
    text = PAGE.read_text()
    assert [mark[1] for mark in report.MARK.findall(text)] == ["used"]
    assert report.filled(text) == text, "run python -m benchmarks report docs/integrations/README.md"


@pytest.mark.parametrize("project", FILES)
def test_every_test_has_passed_at_the_versions_that_are_asked_for(project: str) -> None:
    tests, versions = (ROOT / "tests" / "trainers" / name for name in FILES[project])
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", versions.read_text(), re.MULTILINE))
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    ran = [line for line in LINES if line["project"] == project]
    defined = {node.name for node in ast.parse(tests.read_text()).body if isinstance(node, ast.FunctionDef)}
    defined = {name for name in defined if name.startswith("test_")}
    assert {re.sub(r"^.*::|\[.*", "", line["test"]) for line in ran} == defined, "run make test-trainers"
    for line in ran:
        assert line["outcome"] == "passed", line["test"]
        assert line["version"] == pinned[project]
        assert {name: x.partition("+")[0] for name, x in line["beside"].items()}.items() <= pinned.items()


def test_only_these_projects_are_told() -> None:
    assert {line["project"] for line in LINES} == {*FILES}
