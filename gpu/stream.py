"""pytest plugin: a line of JSON for each test as it ends, so that a run that is killed has not run for nothing.

pytest -p gpu.stream --stream tests.jsonl

Under pytest-xdist a worker whose GPU is lost to it ends, and another takes its place: one fault fails one test.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu.faults import lost
from gpu.lines import Line, append

SAID = 2_500  # characters of a failure


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stream", type=Path, help="the file that a line for each test is appended to")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Worker())
    elif file := config.getoption(
        "--stream"
    ):  # pytest-xdist hands every report to the process that started the workers
        config.pluginmanager.register(Stream(file))


class Stream:
    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        outcome = "error" if report.failed and report.when != "call" else report.outcome
        line: Line = {"test": report.nodeid, "outcome": outcome, "seconds": round(report.duration, 2)}
        if not report.passed:
            line["why"] = why(report)
        append(self.file, line)


def why(report: pytest.TestReport) -> str:
    """The end of the failure's text, or the reason of a skip."""
    if isinstance(report.longrepr, tuple):  # file, line, reason
        return report.longrepr[-1]
    return str(report.longrepr)[-SAID:]


class Worker:
    def __init__(self) -> None:
        self.is_lost = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.is_lost |= report.failed and lost(str(report.longrepr))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        result = yield
        if self.is_lost:
            os._exit(1)
        return result
