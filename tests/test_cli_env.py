"""The report of a bug prints whatever is broken."""

import pytest
import torch
from conftest import BACKENDS, DEVICE

from tests.processes import python
from topk_rkl import backends
from topk_rkl.cli import env


def test_it_tells_versions_and_backends() -> None:
    facts = env.facts()
    assert facts["torch"] == torch.__version__
    assert facts["reference backend"] == "can run"
    assert facts["native backend"] == "can run" or "extension" in facts["native backend"]
    assert facts["native build"] == "none" or "portable" in facts["native build"]
    assert facts["auto takes"].startswith(("native on a CPU", "reference, plain PyTorch and slower, on a CPU"))
    assert not [name for name, finding in facts.items() if finding.startswith("failed")]


def test_a_broken_probe_does_not_stop_it(monkeypatch) -> None:
    def broken() -> str:
        raise OSError("no such driver")

    monkeypatch.setattr(env, "_gpus", broken)
    facts = env.facts()
    assert facts["gpus"] == "failed: OSError: no such driver" and facts["torch"] == torch.__version__


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_can_run_where_it_ran_and_was_right(name: str, monkeypatch) -> None:
    def failing(*_: object) -> None:
        raise OSError("no C compiler")

    assert env.facts()[f"{name} backend"] == "can run"
    monkeypatch.setattr(backends._load(name), "select", lambda _logits, _normalize, ids, _log_probs: ids.fill_(2))
    assert "runs and is wrong: [2, 2]" in env.facts()[f"{name} backend"]
    monkeypatch.setattr(backends._load(name), "select", failing)
    assert env.facts()[f"{name} backend"] == "failed: OSError: no C compiler"


@pytest.mark.slow
def test_it_runs_as_a_program_and_says_what_is_missing() -> None:
    code = "import sys, runpy; sys.modules['topk_rkl._native'] = None\n"
    outcome = python(code + "sys.argv[1:] = ['env']; runpy.run_module('topk_rkl', run_name='__main__')")
    assert outcome.returncode == 0 and f"torch              {torch.__version__}" in outcome.stdout
    assert "auto takes         reference, plain PyTorch and slower, on a CPU" in outcome.stdout
    assert "install a C++20 compiler" in outcome.stdout and "UserWarning" not in outcome.stderr
    if DEVICE == "cpu" and "triton" in BACKENDS:
        assert "triton backend     there is no GPU that torch can use; set TRITON_INTERPRET=1" in outcome.stdout
