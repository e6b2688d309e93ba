"""What a GPU measured comes home as it was, and the tables say what the lines say. All lines here are made up."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import collect, gpu_report, report
from gpu.items.inputs import FULL, Inputs
from gpu.items.registry import registry

SETTING = {
    "date": "2030-01-02", "commit": "0123456789abcdef", "device": "Card X", "driver": "700.1", "cuda": "14.0",
    "python": "3.12.1", "torch": "3.0", "triton": "4.0",
}  # fmt: skip


def line(item: str, form: str, ms: float | None, over: float = 1.0, **more: Any) -> dict[str, Any]:
    time = {"median_ms": ms, "quartiles_ms": [ms - 0.5, ms + 0.25], "over_first": over} if ms else {}
    return {"item": item, "form": form, "backend": form, **time, **SETTING, **more}


LINES = [
    line("select K 64", "triton", 2.0, decision="backend", if_it_wins="take it.", share=0.9, of="read", tb_s=2.5,
         predicted_share=0.75),
    line("select K 64", "cuda", 1.95, 0.98, decision="backend", if_it_wins="take it.", share=0.923, of="read"),
    line("select K 64", "torch.topk", 31.2, 15.6, backend="torch", decision="backend", if_it_wins="take it."),
    line("select K 256", "triton", 4.0, decision="backend", if_it_wins="take it.", share=0.44, of="read"),
    line("select K 256", "cuda", 2.0, 0.5, decision="backend", if_it_wins="take it.", share=0.88, of="read"),
    line("select K 1,024", "triton", None, error="RuntimeError: a | b\nc", decision="backend", if_it_wins="take it."),
    line("select K 1,024", "cuda", 3.0, decision="backend", if_it_wins="take it.", share=0.6, of="read"),
    line("linear K 32, dhidden and dhead", "triton", 3.5),
    line("linear K 32, dhidden and dhead", "cuda", None, missing="no extension"),
    line("linear K 32, dhidden and dhead", "dense products", 87.5, 25.0, backend="torch"),
    line("host, teacher_topk", "triton", 0.04, clock="host"),
]  # fmt: skip


@pytest.fixture
def results(tmp_path: Path, monkeypatch) -> Path:
    """An empty folder of results."""
    folder = tmp_path / "results"
    folder.mkdir()
    for module in (gpu_report, collect):
        monkeypatch.setattr(module, "FOLDER", folder)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def write(file: Path, lines: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(x) + "\n" for x in lines))


@pytest.mark.parametrize("argument", ["targets", "items", "decisions"])
def test_without_results_the_mark_says_so(argument: str, results: Path) -> None:
    text = report.filled(f"<!-- gpu {argument} -->\nold\n<!-- end -->")
    assert text == f"<!-- gpu {argument} -->\nNo GPU has been measured yet.\n<!-- end -->"


def test_the_targets_beside_what_was_measured(results: Path) -> None:
    write(results / "gpu_items.jsonl", LINES)
    counts = {"passed": 2_100, "failed": 1}
    (results / "gpu_tests.json").write_text(json.dumps({**SETTING, "outcomes": counts, "failures": {}}))
    text = gpu_report.gpu("targets")
    assert "| selection, K = 64 | 0.92 of the floor | 0.92 of read | cuda |\n" in text
    assert "| selection, K = 256 | 0.85 of the floor | 0.88 of read | cuda |\n" in text
    assert "| selection and loss in one launch, K = 64 | 0.90 of the floor | not measured |  |\n" in text
    assert "| from hidden states, K = 32: with dhead too | 3 ms | 3.5 ms | triton |\n" in text
    assert "| the dense products beside that | 20 times | 25.0 times | triton |\n" in text
    assert "| torch.topk beside the selection, K = 64 | 12 times | 16.0 times | cuda |\n" in text
    assert "\nCard X, driver 700.1, CUDA 14.0, torch 3.0, Triton 4.0, commit 012345678, 2030-01-02.\n" in text
    assert text.endswith("Tests on Card X, commit 012345678: 2,100 passed, 1 failed.\n")


def test_the_items_with_shares_and_predictions(results: Path) -> None:
    write(results / "gpu_items.jsonl", LINES)
    text = gpu_report.gpu("items")
    assert "| select K 64 | triton | 2 | 1.5 to 2.25 | 2.50 | 0.90 | read | 0.75 | 1.20 |\n" in text
    assert "| select K 64 | cuda | 1.95 | 1.45 to 2.2 |  | 0.92 | read |  |  |\n" in text
    assert "| select K 1,024 | triton | error: RuntimeError: a / b |  |  |  |  |  |  |\n" in text
    assert "| linear K 32, dhidden and dhead | cuda | missing: no extension |  |" in text
    assert "| host, teacher_topk | triton | 0.04 | -0.46 to 0.29 |  |  | host |  |  |\n" in text
    assert text.count("\n| ") == len(LINES) + 1


def test_the_decisions_with_their_winner(results: Path) -> None:
    write(results / "gpu_items.jsonl", LINES)
    text = gpu_report.gpu("decisions")
    assert "**Backend.** Where another form than the first wins: take it.\n" in text
    assert "| select K 64 | triton 1.00, cuda 0.98 | triton |\n" in text  # 2 % are not enough
    assert "| select K 256 | triton 1.00, cuda 0.50 | cuda |\n" in text
    assert "| select K 1,024 | cuda 1.00 | nothing to compare |\n" in text
    assert "linear" not in text and "torch.topk" not in text


def test_every_target_has_its_item_and_rival() -> None:
    items = {item.name: item for item in registry(Inputs(FULL, "cpu"))}
    for target in gpu_report.TARGETS:
        forms = items[target.item].forms
        assert sum(map(bool, (target.share, target.ms, target.times))) == 1
        assert {"triton", "cuda"} <= forms.keys() and (not target.rival or target.rival in forms)


def test_the_page_of_results_is_what_the_results_say() -> None:
    assert report.page() == (report.FOLDER / "README.md").read_text(), "run python -m benchmarks report"


CARD = {
    "card": {"name": "Card X", "cores": 132}, "commit": "0123456789abcdef", "python": "3.12.1", "torch": "3.0",
    "triton": "4.0", "numpy": "2.5", "nvidia-smi": "Card X, 700.1, 9.0, 80 GB, 1980, 2619",
}  # fmt: skip
TESTS = [
    {"test": "a", "outcome": "failed", "seconds": 1, "why": "first run\nAssertionError: 1"},
    {"test": "b", "outcome": "passed", "seconds": 1},
    {"test": "c", "outcome": "skipped", "seconds": 1, "why": "no AMD"},
    {"test": "d", "outcome": "passed", "seconds": 1},
    {"test": "d", "outcome": "error", "seconds": 1, "why": "RuntimeError: 2\n"},
    {"test": "a", "outcome": "failed", "seconds": 1, "why": "second run\nE  AssertionError: 3\n"},
]


def test_a_folder_of_the_kit_becomes_results(results: Path, out: Path) -> None:
    write(out / "items.jsonl", [{"item": "select K 64", "begun": True, **SETTING}, *LINES])
    write(out / "suite.jsonl", [{"name": "select", **SETTING}])
    write(out / "tests.jsonl", TESTS)
    write(out / "steps.jsonl", [{"step": "card", "begins": 0.1}, CARD])
    collect.collect(Namespace(folder=out))
    assert report.load(results / "gpu_items.jsonl") == LINES
    assert report.load(results / "gpu.jsonl") == [{"name": "select", **SETTING}]
    assert json.loads((results / "gpu_tests.json").read_text()) == {
        "device": "Card X", "driver": "700.1", "commit": "0123456789abcdef", "python": "3.12.1", "torch": "3.0",
        "triton": "4.0", "numpy": "2.5", "outcomes": {"failed": 1, "passed": 1, "skipped": 1, "error": 1},
        "failures": {"a": "E  AssertionError: 3", "d": "RuntimeError: 2"},
    }  # fmt: skip


def test_what_is_not_in_the_folder_stays_as_it_was(results: Path, out: Path) -> None:
    (results / "gpu_items.jsonl").write_text("before\n")
    write(out / "suite.jsonl", [{"name": "select", **SETTING}])
    collect.collect(Namespace(folder=out))
    assert (results / "gpu_items.jsonl").read_text() == "before\n" and not (results / "gpu_tests.json").exists()
    with pytest.raises(FileNotFoundError, match=r"no items.jsonl, suite.jsonl or tests.jsonl"):
        collect.collect(Namespace(folder=results))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"commit": "unknown"}, "items.jsonl has a line of commit 'unknown'; measure a committed state"),
        ({"commit": "0123456789abcdef-dirty"}, "of commit '0123456789abcdef-dirty'"),
        ({"driver": None}, "items.jsonl has a line of 'Card X', no GPU; a rehearsal is no result"),
    ],
)
def test_a_line_of_no_clean_commit_or_no_gpu_is_refused(changes: dict, why: str, results: Path, out: Path) -> None:
    bad = {name: value for name, value in {**LINES[-1], **changes}.items() if value}
    write(out / "items.jsonl", [*LINES, bad])
    write(out / "suite.jsonl", [{"name": "select", **SETTING}])
    with pytest.raises(ValueError, match=why):
        collect.collect(Namespace(folder=out))
    assert list(results.iterdir()) == []


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([{"step": "card"}], "steps.jsonl has no line of the card"),
        ([{**CARD, "commit": "unknown"}], "steps.jsonl has a line of commit 'unknown'"),
        ([{**CARD, "nvidia-smi": "not installed", "card": {}}], "steps.jsonl has a line of 'a CPU', no GPU"),
    ],
)
def test_tests_of_an_unknown_run_are_refused(steps: list, why: str, results: Path, out: Path) -> None:
    write(out / "tests.jsonl", TESTS)
    write(out / "steps.jsonl", steps)
    with pytest.raises((ValueError, FileNotFoundError), match=why):
        collect.collect(Namespace(folder=out))
    assert list(results.iterdir()) == []
