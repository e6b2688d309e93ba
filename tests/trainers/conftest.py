"""`--outcomes FILE` writes what ran in real trainers: a JSON line per test, in place of those of the same projects.

A test's docstring says what it runs, for the table of docs/integrations/README.md. `make test-trainers` passes it.
"""

import datetime
import importlib.metadata
import json
import platform
import re
from pathlib import Path

import pytest

BESIDE = ("torch", "transformers", "megatron-core", "trl")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="the file of JSON lines")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> object:
    report = yield
    if call.when == "call" or report.outcome != "passed":
        ran = item.config.stash.setdefault(RAN, {})
        ran[item.nodeid] = (item, report.outcome)
    return report


RAN = pytest.StashKey[dict]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    file, ran = session.config.getoption("outcomes", None), session.config.stash.get(RAN, {})
    if file is None or not ran:
        return
    lines = [told(item, outcome) for item, outcome in ran.values()]
    projects = {line["project"] for line in lines}
    kept = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    lines += [line for line in kept if line["project"] not in projects]
    lines.sort(key=lambda line: (line["project"].lower(), line["test"]))
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def told(item: pytest.Item, outcome: str) -> dict[str, object]:
    project = item.module.PROJECT
    values = item.callspec.params if hasattr(item, "callspec") else {}
    return {
        "project": project,
        "version": importlib.metadata.version(project),
        "test": re.sub(r"^.*/", "", item.nodeid),
        "what": item.function.__doc__.format(**values),
        "outcome": outcome,
        "beside": {name: version for name in BESIDE if (version := installed(name))},
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
