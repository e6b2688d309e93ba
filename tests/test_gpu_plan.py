"""What `python3 -m gpu` runs, with which extension, of which commit, and what it says of the results."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.cases import SUITES
from gpu import card, checks, commit, extension, plan, smoke
from gpu.faults import lost
from gpu.lines import Line, append
from gpu.summary import summary

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("text", "is_lost"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: misaligned address", True),
        ("CUDA error: unspecified launch failure", True),
        ("linear_loss_kernel of N = 3: invalid argument", False),
        ("CUDA out of memory. Tried to allocate 2 GiB", False),
    ],
)
def test_which_errors_lose_the_gpu(text: str, is_lost: bool) -> None:
    assert lost(text) == is_lost


def test_every_test_file_is_run_on_a_gpu_or_has_a_reason_not_to() -> None:
    files = sorted(file.stem.removeprefix("test_") for file in (ROOT / "tests").glob("test_*.py"))
    assert sorted([*plan.TESTED, *plan.UNTESTED]) == files
    assert all(plan.UNTESTED.values())
    for name in set(plan.UNTESTED) - {"gpu_plan"}:  # a file whose tensors follow the device is for a GPU
        assert "device=DEVICE" not in (ROOT / "tests" / f"test_{name}.py").read_text(), name


def test_what_is_left_out_of_a_tested_file_is_a_test_that_it_has() -> None:
    for name in plan.UNTESTED_THERE:
        file, _, test = name.partition(".py::")
        assert file in plan.TESTED and f"def {test}(" in (ROOT / "tests" / f"test_{file}.py").read_text(), name
    assert all(plan.UNTESTED_THERE.values())


def test_the_plans_have_every_case_and_every_group() -> None:
    assert set(plan.CASES) == {case.name for case in SUITES["gpu"]}
    assert {name for names in smoke.GROUPS.values() for name in names} == set(checks.GROUPS)
    first, second, beside = (plan.steps(name, Path("out"), False) for name in ("first", "second", "beside"))
    assert [step.name for step in first] == ["smoke triton", "smoke cuda", "items", "tests", "sanitizer", "ncu"]
    assert [step.kind for step in second] == ["suite"] * (len(plan.CASES) - 1) + ["ncu", "tests", "suite"]
    assert [step.name for step in beside] == [f"suite {name}" for name in plan.BESIDE_OTHERS]
    assert plan.BESIDE_OTHERS.keys() <= set(plan.CASES)
    assert [("--only-ours" in step.command) for step in (*second, *beside) if step.kind == "suite"] == (
        [True] * len(plan.CASES) + [False] * len(beside)
    )
    files = {"steps.jsonl", "output.txt", "smoke.jsonl", "items.jsonl", "tests.jsonl", *(step.file for step in first)}
    assert len(files) <= 8
    assert first[0].name == plan.BESIDE and set(plan.NEED_EXTENSION) <= {step.name for step in first}
    profiled = first[-1].command
    assert profiled[profiled.index("--clock-control") + 1] == "none"


def test_an_extension_of_other_sources_or_another_python_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"has nothing; this Python needs {extension.NAME}" in extension.refusal(tmp_path)
    (tmp_path / "_cuda.cpython-30-other.so").touch()
    assert "has _cuda.cpython-30-other.so; this Python needs" in extension.refusal(tmp_path)
    (tmp_path / extension.NAME).touch()
    monkeypatch.setattr(card, "capability", lambda: "9.0")
    note = {"sources": extension.sources(), "architecture": "90a-real"}
    for wrong, said in (({"sources": "?"}, "was built from other sources"), ({"architecture": "80-real"}, "80-real")):
        (tmp_path / extension.NOTE).write_text(json.dumps(note | wrong))
        assert said in extension.refusal(tmp_path)
    (tmp_path / extension.NOTE).write_text(json.dumps(note))
    assert extension.refusal(tmp_path) is None


def test_an_extension_is_taken_if_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, root = tmp_path / "built", tmp_path / "root"
    built.mkdir()
    (root / "topk_rkl").mkdir(parents=True)
    (built / extension.NAME).write_text("new")
    place = root / "topk_rkl" / extension.NAME
    monkeypatch.setattr(extension, "ROOT", root)
    for refusal, loads, want in ((None, True, True), (None, False, False), ("other sources", True, False)):
        place.write_text("old")
        monkeypatch.setattr(extension, "refusal", lambda _, refusal=refusal: refusal)
        monkeypatch.setattr(extension, "loads", lambda loads=loads: loads)
        assert extension.take(built) == want == place.exists() == extension.is_taken()
        assert not want or place.read_text() == "new"


def test_the_digest_of_the_sources_follows_each_of_them(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    before = extension.sources(tmp_path)
    assert before == extension.sources()
    for name in ("CMakeLists.txt", "csrc/cuda/select.cu", "csrc/cuda/bindings.cpp"):
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        after = extension.sources(tmp_path)
        assert after != before
        before = after


def test_the_architecture_is_that_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, name in (("NVIDIA H100 80GB HBM3, 580.1, 9.0, 81559 MiB, 1980 MHz, 2619 MHz", "90a-real"),
                       ("NVIDIA L4, 580.1, 8.9, 23034 MiB, 2040 MHz, 6251 MHz", "89-real")):  # fmt: skip
        monkeypatch.setattr(card, "tool", lambda *_, said=said: said)
        assert extension.architecture() == name
    monkeypatch.setattr(card, "tool", lambda *_: "not installed")
    with pytest.raises(SystemExit, match="nvidia-smi names no GPU; give --architecture"):
        extension.architecture()


def test_the_commit_is_given_or_that_of_git_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMMIT", raising=False)
    assert commit.commit(tmp_path) == "unknown"
    git = ("git", "-c", "user.name=n", "-c", "user.email=e")
    (tmp_path / "file").touch()
    for words in (("init", "-q"), ("add", "file"), ("commit", "-qm", "m")):
        subprocess.run((*git, *words), cwd=tmp_path, check=True)
    assert re.fullmatch(r"[0-9a-f]{40}", sha := commit.commit(tmp_path))
    (tmp_path / "file").write_text("changed")
    assert commit.commit(tmp_path) == f"{sha}-dirty"
    monkeypatch.setenv("COMMIT", "given")
    assert commit.commit(tmp_path) == "given"
    assert "COMMIT=" in summary(tmp_path, [], "unknown") and "COMMIT=" not in summary(tmp_path, [], sha)


def test_the_summary_counts_and_names_failures(tmp_path: Path) -> None:
    lines: dict[str, list[Line]] = {
        "smoke": [{"backend": "cuda", "check": "select V 9", "outcome": "FAIL", "error": "of the rows [3]"}],
        "items": [
            {"item": "read", "begun": True},
            {"item": "read", "form": "triton", "median_ms": 1.0},
            {"item": "select", "form": "cuda", "missing": "not built"},
            {"item": "copy", "form": "torch", "error": "RuntimeError: none"},
        ],
        "suite": [{"name": "loss", "contestant": "topk_rkl", "refused": "off by 1"}],
        "tests": [{"test": f"a::t{i}", "outcome": "failed", "why": "first\nlast"} for i in range(30)],
    }
    for name, some in lines.items():
        for line in some:
            append(tmp_path / f"{name}.jsonl", line)
    (tmp_path / "sanitizer.txt").write_text("racecheck: noise\nracecheck: ends with 9\n")
    said = summary(tmp_path, [{"step": "smoke cuda", "left_out": "NO EXTENSION", "exit": 1}], "a commit").splitlines()
    assert "smoke: 1 FAIL" in said and "  FAIL cuda select V 9: of the rows [3]" in said
    assert "items: 1 ok, 1 missing, 1 FAIL" in said and "  FAIL copy torch: RuntimeError: none" in said
    assert "suite: 1 FAIL" in said and "  FAIL loss topk_rkl: off by 1" in said
    assert "tests: 30 failed" in said and "  failed a::t0: last" in said and "  and 10 more" in said
    assert "racecheck: ends with 9" in said and "racecheck: noise" not in said
    assert said[-1].startswith("NO EXTENSION: no CUDA kernel")
