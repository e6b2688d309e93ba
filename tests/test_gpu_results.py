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
OTHER = {"device": "NVIDIA H100 80GB HBM3", "commit": "fedcba9876543210"}


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
    for module in (gpu_report, collect, report):
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
    (results / "gpu_tests.json").write_text(json.dumps([{**SETTING, "outcomes": counts, "failures": {}}]))
    text = gpu_report.gpu("targets")
    assert text.startswith(
        "| N = 16,384, V = 151,936, H = 4,096, bfloat16 | target | Card X |\n| --- | ---: | ---: |\n"
    )
    assert "| selection, K = 64 | 0.92 of the floor | 0.923 of read, cuda |\n" in text
    assert "| selection, K = 256 | 0.85 of the floor | 0.880 of read, cuda |\n" in text
    assert "| selection and loss in one launch, K = 64 | 0.90 of the floor | not measured |\n" in text
    assert "| from hidden states, K = 32: with dhead too | 3 ms | 3.5 ms, triton |\n" in text
    assert "| the dense products beside that | 20 times | 25.0 times, triton |\n" in text
    assert "| torch.topk beside the selection, K = 64 | 12 times | 16.0 times, cuda |\n" in text
    assert "\nCard X, driver 700.1, CUDA 14.0, torch 3.0, Triton 4.0, commit 012345678, 2030-01-02.\n" in text
    assert text.endswith("Tests on Card X, commit 012345678: 2,100 passed, 1 failed.\n")


def test_the_items_with_shares_and_predictions(results: Path) -> None:
    write(results / "gpu_items.jsonl", LINES)
    text = gpu_report.gpu("items")
    assert text.startswith("**Card X**\n\n| item | form | ms |")
    assert "| select K 64 | triton | 2 | 1.5 to 2.25 | 2.50 | 0.90 | read | 0.75 | 1.20 |\n" in text
    assert "| select K 64 | cuda | 1.95 | 1.45 to 2.2 |  | 0.92 | read |  |  |\n" in text
    assert "| select K 1,024 | triton | error: RuntimeError: a / b |  |  |  |  |  |  |\n" in text
    assert "| linear K 32, dhidden and dhead | cuda | missing: no extension |  |" in text
    assert "| host, teacher_topk | triton | 0.04 | -0.46 to 0.29 |  |  | host |  |  |\n" in text
    assert text.count("\n| ") == len(LINES) + 2


def test_the_decisions_with_their_winner(results: Path) -> None:
    write(results / "gpu_items.jsonl", LINES)
    text = gpu_report.gpu("decisions")
    assert "**Backend.** Where another form than the first wins: take it.\n" in text
    assert "| Card X | select K 64 | triton 1.00, cuda 0.98 | triton |\n" in text  # 2 % are not enough
    assert "| Card X | select K 256 | triton 1.00, cuda 0.50 | cuda |\n" in text
    assert "| Card X | select K 1,024 | cuda 1.00 | nothing to compare |\n" in text
    assert "linear" not in text and "torch.topk" not in text


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
    ],
)
def test_the_short_name_of_a_device(device: str, name: str) -> None:
    assert gpu_report.short(device) == name


def test_two_devices_side_by_side(results: Path) -> None:
    other = [
        line("select K 64", "triton", 3.0, decision="backend", if_it_wins="take it.", share=0.8, of="read", **OTHER),
        line("select K 64", "cuda", 2.4, 0.8, decision="backend", if_it_wins="take it.", **OTHER),
        line("linear K 32, dhidden and dhead", "triton", 4.0, **OTHER),
    ]
    write(results / "gpu_items.jsonl", [*LINES, *other])
    runs = [{**SETTING, "outcomes": {"passed": 3}}, {**SETTING, **OTHER, "outcomes": {"passed": 2, "failed": 1}}]
    (results / "gpu_tests.json").write_text(json.dumps(runs))
    first = "Card X, driver 700.1, CUDA 14.0, torch 3.0, Triton 4.0, commit 012345678, 2030-01-02.\n"
    second = first.replace("Card X", "NVIDIA H100 80GB HBM3").replace("012345678", "fedcba987")

    text = gpu_report.gpu("targets")
    assert "bfloat16 | target | Card X | H100 |\n| --- | ---: | ---: | ---: |\n" in text
    assert "| selection, K = 64 | 0.92 of the floor | 0.923 of read, cuda | not measured |\n" in text  # cuda: no share
    assert "| selection, K = 256 | 0.85 of the floor | 0.880 of read, cuda | not measured |\n" in text
    assert "| from hidden states, K = 32: with dhead too | 3 ms | 3.5 ms, triton | 4 ms, triton |\n" in text
    tests = "Tests on Card X, commit 012345678: 3 passed.\n"
    others = "Tests on NVIDIA H100 80GB HBM3, commit fedcba987: 2 passed, 1 failed.\n"
    assert text.endswith(f"|\n\n{first}{tests}\n{second}{others}")

    text = gpu_report.gpu("items")
    assert text.startswith("**Card X**\n\n| item |") and text.endswith(f"|\n\n{second}")
    assert f"|\n\n{first}\n**H100**\n\n| item |" in text
    assert text.count("\n| ") == len(LINES) + len(other) + 4
    assert "| select K 64 | triton | 3 |" in text.partition("**H100**")[2]

    text = gpu_report.gpu("decisions")
    assert text.count("**Backend.**") == 1 and text.endswith(f"|\n\n{first}\n{second}")
    assert "\n| Card X | select K 64 | triton 1.00, cuda 0.98 | triton |\n" in text
    assert "\n| H100 | select K 64 | triton 1.00, cuda 0.80 | cuda |\n" in text


def test_tests_of_a_device_without_items_are_told(results: Path) -> None:
    write(results / "gpu_items.jsonl", LINES)
    (results / "gpu_tests.json").write_text(json.dumps([{**SETTING, **OTHER, "outcomes": {"passed": 2}}]))
    text = gpu_report.gpu("targets")
    assert text.endswith("2030-01-02.\n\nTests on NVIDIA H100 80GB HBM3, commit fedcba987: 2 passed.\n")


def test_the_measured_share_of_each_device(results: Path) -> None:
    sizes = {"kernel": "select", "dtype": "bfloat16", "v": 1000, "k": 64}
    shares = [(0.923, {}), (0.5, {}), (0.9, OTHER)]  # of two lines of a device, the first
    write(results / "gpu_items.jsonl", [line("a", "triton", 2.0, share=x, **sizes, **more) for x, more in shares])
    found = report.measured_share("select", "bfloat16", 1000, 64, 0)
    assert found == "0.92, Card X; 0.90, NVIDIA H100 80GB HBM3"
    assert report.measured_share("select", "bfloat16", 1000, 64, 0, "cuda") == "not measured"
    assert report.measured_share("no kernel", "bfloat16", 1000, 64, 0) == ""


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
    assert json.loads((results / "gpu_tests.json").read_text()) == [{
        "device": "Card X", "driver": "700.1", "commit": "0123456789abcdef", "python": "3.12.1", "torch": "3.0",
        "triton": "4.0", "numpy": "2.5", "outcomes": {"failed": 1, "passed": 1, "skipped": 1, "error": 1},
        "failures": {"a": "E  AssertionError: 3", "d": "RuntimeError: 2"},
    }]  # fmt: skip


def collect_run(out: Path, lines: list[dict[str, Any]], device: str, outcome: str) -> None:
    """Collects these items of a run, and the outcome of one test."""
    write(out / "items.jsonl", lines)
    write(out / "tests.jsonl", [{"test": "a", "outcome": outcome}])
    write(out / "steps.jsonl", [{**CARD, "card": {"name": device}}])
    collect.collect(Namespace(folder=out))


def test_a_device_replaces_its_own_results_alone(results: Path, out: Path) -> None:
    other = [line("select K 64", "triton", 3.0, **OTHER), line("host, teacher_topk", "triton", 0.05, **OTHER)]
    collect_run(out, LINES, "Card X", "passed")
    collect_run(out, other, OTHER["device"], "failed")
    assert report.load(results / "gpu_items.jsonl") == [*LINES, *other]
    assert outcomes_by_device(results) == [("Card X", {"passed": 1}), (OTHER["device"], {"failed": 1})]

    again = [line("select K 64", "triton", 1.0)]
    collect_run(out, again, "Card X", "skipped")
    assert report.load(results / "gpu_items.jsonl") == [*again, *other]
    assert outcomes_by_device(results) == [("Card X", {"skipped": 1}), (OTHER["device"], {"failed": 1})]


def outcomes_by_device(results: Path) -> list[tuple[str, dict[str, int]]]:
    return [(run["device"], run["outcomes"]) for run in json.loads((results / "gpu_tests.json").read_text())]


def test_a_case_of_the_suite_replaces_that_of_its_name(results: Path, out: Path) -> None:
    write(results / "gpu.jsonl", [{"name": "select", "n": 1, **SETTING}, {"name": "loss", "n": 2, **SETTING}])
    write(out / "suite.jsonl", [{"name": "select", "n": 3, **SETTING}])
    collect.collect(Namespace(folder=out))
    assert [(x["name"], x["n"]) for x in report.load(results / "gpu.jsonl")] == [("select", 3), ("loss", 2)]


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
