"""The frame of the studies in examples/paper, and what is committed of them."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from examples.paper import __main__ as command, stacked, study, summary
from examples.paper.study import Claim

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", study.NAMES)
def test_a_committed_table_is_that_of_its_record(name: str) -> None:
    assert (study.RESULTS / f"{name}.md").read_text() == study.page(name, study.load(name)), "run --redraw"
    assert (study.RESULTS / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", study.NAMES)
def test_a_committed_record_is_of_the_default_study(name: str) -> None:
    record, module = study.load(name), study.study(name)
    assert record["size"] == json.loads(json.dumps(module.Size()._asdict())) and record["seeds"] == list(module.SEEDS)
    assert record["threads"] == 2


def test_every_study_is_in_the_page() -> None:
    page = (ROOT / "docs/paper.md").read_text()
    for name in study.NAMES:
        assert re.search(rf"python -m examples.paper (\w+ )*{name}\b", page) and f"results/{name}.png" in page
        for title in study.study(name).tables(study.load(name)):
            assert f"<!-- paper {name} {title} -->" in page, title


def test_a_run_leaves_its_record_its_tables_and_its_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    seen: list = []

    def measure(size, seeds) -> dict:
        seen.append((size, seeds))
        return {"mean": 1.5}

    module = SimpleNamespace(
        Size=lambda: SimpleNamespace(_asdict=lambda: {"steps": 3}),
        FULL=SimpleNamespace(_asdict=lambda: {"steps": 9}),
        measure=measure,
        tables=lambda record: {"Means": [["x"], [str(record["mean"])]]},
        claims=lambda record: [Claim("paper", "It falls.", str(record["mean"]), record["mean"] < 1)],
        draw=lambda _: figure.Figure(),
    )
    monkeypatch.setattr(study, "study", lambda _: module)
    study.run("small", False, [1, 2], tmp_path)
    study.run("large", True, [1], tmp_path)
    record = study.load("small", tmp_path)
    assert (record["size"], record["seeds"], record["mean"]) == ({"steps": 3}, [1, 2], 1.5)
    assert study.load("large", tmp_path)["size"] == {"steps": 9} and seen[0][1] == [1, 2]
    text = (tmp_path / "small.md").read_text()
    assert "| paper | It falls. | 1.5 | **did not hold** |" in text and "## Means\n\n| x |\n| ---: |\n| 1.5 |" in text
    assert (tmp_path / "small.png").stat().st_size > 0


def test_what_the_verdicts_say() -> None:
    rows = study.verdicts(Claim("a", "b", "c", held) for held in (True, False, None))
    assert [row[-1] for row in rows[1:]] == ["held", "**did not hold**", "not shown"]


def test_an_interval_is_students() -> None:
    mean, half = summary.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * math.sqrt(2.5 / 5))
    assert summary.interval([1.0, 3.0])[1] == pytest.approx(12.706)
    many = [float(i % 2) for i in range(40)]
    assert summary.interval(many)[1] == pytest.approx(2.228 * torch.tensor(many).std().item() / 40**0.5, rel=1e-5)
    assert summary.interval([2.0])[0] == 2 and math.isnan(summary.interval([2.0])[1])


def test_a_verdict_needs_an_interval_beside_the_limit() -> None:
    assert summary.above([1.0, 1.1, 0.9]) is True and summary.above([-1.0, -1.1, -0.9]) is False
    assert summary.above([1.0, -1.0, 0.1]) is summary.above([3.0]) is summary.above([]) is None
    assert summary.above([1.0, 1.1, 0.9], 2.0) is False
    assert [summary.every(x) for x in ([True, True], [True, None], [None, False])] == [True, None, False]


def test_how_numbers_are_told() -> None:
    assert summary.shown([1.0, 3.0], 1) == "2.0 ± 12.7" and summary.shown([2.0]) == "2.000"
    assert summary.shown([]) == "none" and summary.reach([3.0, 1.0, 2.5]) == "2.5 (1 to 3)"
    given = {0.5: (torch.tensor([1 / 3]), None), "steps": 123_456, "x": 123_456.0}
    assert summary.rounded(given) == {"0.5": [[0.33333], None], "steps": 123_456, "x": 123_460.0}


def test_a_table_has_numbers_flush_right() -> None:
    rows = [["name", "n", "source"], ["a", "1 ± 2", "2603.25562, section 3"], ["b", "", "2603.25562"]]
    assert summary.markdown(rows).splitlines()[:3] == [
        "| name | n | source |", "| --- | ---: | --- |", "| a | 1 ± 2 | 2603.25562, section 3 |",
    ]  # fmt: skip


def test_a_stack_of_layers_is_its_layers() -> None:
    layer = stacked.Linear(5, 3, stacked.generators([1, 2]))
    alone = stacked.Linear(5, 3, stacked.generators([2]))
    torch.testing.assert_close(layer.weight[1:], alone.weight, rtol=0, atol=0)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 4, 7, 5)
    for run in range(2):
        expected = x[run] @ layer.weight[run] + layer.bias[run, 0]
        torch.testing.assert_close(layer(x)[run], expected)


def test_gradients_are_clipped_run_by_run() -> None:
    layer = stacked.Linear(5, 3, stacked.generators([1, 2]))
    (layer(torch.randn(2, 4, 5)) * torch.tensor([100.0, 1e-4]).view(2, 1, 1)).sum().backward()
    before = [p.grad.clone() for p in layer.parameters()]
    norms = stacked.clip_grads(layer.parameters(), 1.0)
    for run in range(2):
        single = [nn.Parameter(torch.zeros_like(grad[run])) for grad in before]
        for p, grad in zip(single, before):
            p.grad = grad[run].clone()
        assert norms[run].item() == pytest.approx(nn.utils.clip_grad_norm_(single, 1.0).item(), rel=1e-5)
        for p, q in zip(layer.parameters(), single):
            torch.testing.assert_close(p.grad[run], q.grad)
    assert norms[0] > 1 > norms[1]


@pytest.mark.slow
@pytest.mark.parametrize("package", ["matplotlib", "tqdm"])
def test_the_command_says_how_to_install_what_is_missing(package: str) -> None:
    code = (
        f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_module('examples.paper', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and f"the package {package}; run `make paper`" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["contrl"], ["contrl", *study.NAMES]),
        (["mass", "--threads", "0"], ["--threads is 0", "at least 1"]),
        (["mass", "--redraw", "--out", "nowhere"], ["mass.json in nowhere", "measure first"]),
    ],
)
def test_the_command_refuses_what_it_cannot_do(
    words: list[str], said: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["examples.paper", *words])
    with pytest.raises(SystemExit):
        command.options()
    printed = capsys.readouterr().err
    assert all(part in printed for part in said)
