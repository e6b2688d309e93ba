"""The report of a bug prints whatever is broken."""

import pytest
import torch

from tests.processes import python
from topk_rkl import collect_env


def test_it_tells_versions_and_backends() -> None:
    facts = collect_env.facts()
    assert facts["torch"] == torch.__version__
    assert facts["reference backend"] == "can run"
    assert facts["native backend"] == "can run" or "extension" in facts["native backend"]
    assert facts["native build"] == "none" or "portable" in facts["native build"]
    assert not [name for name, finding in facts.items() if finding.startswith("failed")]


def test_a_broken_probe_does_not_stop_it(monkeypatch) -> None:
    def broken() -> str:
        raise OSError("no such driver")

    monkeypatch.setattr(collect_env, "_gpus", broken)
    facts = collect_env.facts()
    assert facts["gpus"] == "failed: OSError: no such driver" and facts["torch"] == torch.__version__


@pytest.mark.slow
def test_it_runs_as_a_program() -> None:
    outcome = python("import runpy; runpy.run_module('topk_rkl.collect_env', run_name='__main__')")
    assert outcome.returncode == 0 and f"torch              {torch.__version__}" in outcome.stdout
