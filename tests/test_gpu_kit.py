"""`python3 -m gpu` rehearsed without a GPU: in the interpreter, with planted faults, with a kill in the middle."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import BACKENDS

from gpu import smoke, steps
from gpu.lines import read
from gpu.steps import Run, Step
from gpu.summary import summary
from tests.processes import HANGS

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow
interpreted = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed here")


def python(*words: object) -> tuple[str, ...]:
    return (sys.executable, *map(str, words))


def rehearse(root: Path, out: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Into a folder of results, from the files in root."""
    return subprocess.run(
        python("-m", "gpu", "first", "--small", *words),
        cwd=root,
        env={**os.environ, "OUT": str(out), "LIMIT": str(HANGS), "COMMIT": "a commit", **environment},
        capture_output=True,
        text=True,
        timeout=2 * HANGS,
        check=False,
    )


@pytest.mark.interpreter
@interpreted
def test_a_rehearsal_ends_well_and_leaves_few_files(tmp_path: Path) -> None:
    done = rehearse(ROOT, tmp_path, "--steps", "smoke", "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"steps.jsonl", "output.txt", "smoke.jsonl", "tests.jsonl", "tests.txt"}
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    lines = read(tmp_path / "steps.jsonl")
    assert [line["commit"] for line in lines if "card" in line] == ["a commit"]
    ended = [line for line in lines if "exit" in line]
    assert [(line["step"], line["exit"], line["stopped"]) for line in ended] == [
        ("card", 0, False), ("smoke triton", 0, False), ("tests", 0, False),
    ]  # fmt: skip
    found = {line["check"].split()[0]: line["outcome"] for line in read(tmp_path / "smoke.jsonl")}
    assert found == {"scatter": "ok", "tail_logit,": "ok"}
    tests = read(tmp_path / "tests.jsonl")
    assert len(tests) >= 2 and {line["outcome"] for line in tests} == {"passed"}
    assert f"tests: {len(tests)} passed" in done.stdout and "smoke: 6 ok" in done.stdout


PLANTED = """
_right = scatter

def scatter(g, ids, grad_output, out, unique):
    _right(g, ids, grad_output, out, unique)
    if not unique:
        out[0, ids[0, 0]] += 1

def tail_logit(logits, ids, temperature, out):
    import os, signal
    os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.mark.interpreter
@interpreted
def test_a_wrong_kernel_and_one_that_crashes_are_named_and_end_nothing_else(tmp_path: Path) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    for folder in ("topk_rkl", "gpu", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    with (root / "topk_rkl" / "backends" / "triton" / "__init__.py").open("a") as file:
        file.write(PLANTED)
    done = rehearse(root, out, "--steps", "smoke", "tests")
    assert done.returncode == 1, done.stdout + done.stderr
    lines = read(out / "smoke.jsonl")
    wrong = [line for line in lines if line["outcome"] == "FAIL" and line["group"] == "scatter"]
    assert [line["check"] for line in wrong] == [
        f"scatter repeated torch.{dtype} N 3 V 300 K 8" for dtype in ("bfloat16", "float32")
    ]
    for line in wrong:
        assert "Mismatched elements: 1 / 900" in line["error"] and "at checks.py:" in line["error"]
    assert sum(line["outcome"] == "ok" and line["group"] == "scatter" for line in lines) == 2
    (crash,) = (line for line in lines if line["group"] == "mass")
    assert crash["check"] == "the group" and "exit -11" in crash["error"] and "tail_logit, mass_loss" in crash["error"]
    assert "FAIL triton scatter repeated torch.bfloat16 N 3 V 300 K 8" in done.stdout
    outcomes = {line["step"]: line["exit"] for line in read(out / "steps.jsonl") if "exit" in line}
    assert outcomes == {"card": 0, "smoke triton": 1, "tests": 0}


def test_a_group_that_does_not_end_is_a_line(tmp_path: Path) -> None:
    """No group begins within a second, as it imports torch."""
    command = python("-m", "gpu.smoke", "triton", "--out", tmp_path / "lines", "--small", "--limit", 0.2)
    done = subprocess.run((*command, "--group", "loss", "--group", "head"), cwd=ROOT, timeout=HANGS, check=False)
    lines = {line["group"]: line for line in read(tmp_path / "lines")}
    assert done.returncode == 1 and set(lines) == {"loss", "head"}
    assert all(line["outcome"] == "FAIL" and "did not end in 0.2 s" in line["error"] for line in lines.values())


def test_the_groups_that_a_stopped_step_cuts_are_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(smoke, "TOGETHER", 1)
    monkeypatch.setattr(smoke, "time", SimpleNamespace(monotonic=time.monotonic, sleep=interrupt))
    names = ["loss", "head", "mass"]
    options = Namespace(backend="triton", out=tmp_path / "lines", limit=HANGS, small=True, group=names)
    assert smoke.groups(options) == 1
    errors = {line["group"]: line["error"] for line in read(tmp_path / "lines") if line["outcome"] == "FAIL"}
    assert list(errors) == names and errors["loss"].startswith("stopped with the step")
    assert errors["head"] == errors["mass"] == "not begun when the step was stopped"


ENDLESS = """
import os, subprocess, sys, time
from pathlib import Path
from gpu.lines import append
child = subprocess.Popen(["sleep", "100000"])
Path(sys.argv[1]).with_suffix(".pids").write_text(f"{os.getpid()} {child.pid}")
while True:
    append(Path(sys.argv[1]), {"line": "written"})
    time.sleep(0.01)
"""


def endless(file: Path, limit: float = HANGS) -> Step:
    """A step that writes lines and never ends, with a child that does not either."""
    return Step("endless", limit, python("-c", ENDLESS, file))


def here(out: Path, total: float = HANGS) -> Run:
    return Run(total, out, ROOT, {**os.environ, "PYTHONPATH": str(ROOT)})


def wait_for(condition: Callable[[], Any]) -> Any:
    until = time.monotonic() + HANGS
    while not (found := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_step_that_hangs_ends_at_its_limit_and_the_next_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "GRACE", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('on', flush=True); time.sleep(1e5)"
    with here(tmp_path) as run:
        assert not run.step(Step("hang", 0.5, python("-c", "while True: pass")))
        job = run.begin(Step("deaf", HANGS, python("-c", deaf), "deaf.txt"))
        wait_for(lambda: (tmp_path / "deaf.txt").read_text())
        job.limit = 0
        assert not run.end(job)
        job = run.begin(endless(tmp_path / "lines"))
        wait_for(lambda: read(tmp_path / "lines"))
        pids = [*map(int, (tmp_path / "lines.pids").read_text().split())]
        job.limit = 0
        assert not run.end(job)
        assert run.step(Step("next", HANGS, python("-c", "print('ran')"), "next.txt"))
    assert [(line["exit"] != 0, line["stopped"]) for line in run.outcomes] == [(True, True)] * 3 + [(False, False)]
    assert (tmp_path / "next.txt").read_text() == "ran\n"
    wait_for(lambda: not any(map(alive, pids)))
    assert "hang: STOPPED at its limit" in summary(tmp_path, run.outcomes, "a commit")


def test_a_step_is_interrupted_first_so_that_it_can_sum_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "GRACE", HANGS / 2)
    code = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may have it ignored
        "print('on', flush=True)\ntry: time.sleep(1e5)\nexcept KeyboardInterrupt: print('summed up')"
    )
    with here(tmp_path) as run:
        job = run.begin(Step("sums", HANGS, python("-c", code), "sums.txt"))
        wait_for(lambda: (tmp_path / "sums.txt").read_text())
        job.limit = 0
        assert not run.end(job)
    assert (tmp_path / "sums.txt").read_text() == "on\nsummed up\n"


def test_what_does_not_fit_into_the_total_is_left_out(tmp_path: Path) -> None:
    with here(tmp_path, total=3) as run:
        assert not run.step(Step("long", 60, python("-c", "")))
    assert read(tmp_path / "steps.jsonl") == run.outcomes
    assert "LIMIT=3" in run.outcomes[0]["left_out"] and run.outcomes[0]["exit"] == 1


def test_a_step_that_a_fault_cuts_begins_again(tmp_path: Path) -> None:
    code = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); sys.exit(0 if p.exists() else p.touch() or 7)"
    with here(tmp_path) as run:
        assert not run.step(Step("no second try", HANGS, python("-c", "raise SystemExit(7)")))
        assert run.step(Step("cut", HANGS, python("-c", code, tmp_path / "been"), tries=4))
        assert not run.step(Step("all tried", HANGS, python("-c", "raise SystemExit(1)"), tries=4))
    assert [line["exit"] for line in run.outcomes] == [7, 7, 0, 1]


DRIVER = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/tests"]
import test_gpu_kit
from gpu.steps import Step
out = Path(sys.argv[1])
with test_gpu_kit.here(out) as run:
    run.step(Step("first", test_gpu_kit.HANGS, test_gpu_kit.python("-c", "print('done')"), "first.txt"))
    run.step(test_gpu_kit.endless(out / "lines"))
"""


def test_a_kill_in_the_middle_loses_no_line_and_leaves_no_process(tmp_path: Path) -> None:
    driver = subprocess.Popen(python("-c", DRIVER, tmp_path, ROOT), stdout=subprocess.DEVNULL)
    wait_for(lambda: len(read(tmp_path / "lines")) > 20)
    pids = [*map(int, (tmp_path / "lines.pids").read_text().split())]
    assert all(map(alive, pids))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    wait_for(lambda: not any(map(alive, pids)))
    assert set(map(json.dumps, read(tmp_path / "lines"))) == {'{"line": "written"}'}
    assert (tmp_path / "lines").read_text().endswith("\n")
    said = [(line["step"], line.get("exit")) for line in read(tmp_path / "steps.jsonl")]
    assert said == [("first", None), ("first", 0), ("endless", None)]
    assert (tmp_path / "first.txt").read_text() == "done\n"
    assert "first: ok" in summary(tmp_path, read(tmp_path / "steps.jsonl"), "a commit")


TESTS = """
import os, pytest
def note():
    with open("pids", "a") as file:
        file.write(f"{os.getpid()}\\n")
def test_before():
    note()
def test_fault():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_after():
    note()
@pytest.mark.skip(reason="a reason")
def test_skipped():
    pass
@pytest.fixture
def broken():
    raise ValueError("broken")
def test_with_a_broken_fixture(broken):
    pass
"""


def test_each_test_is_a_line_and_a_lost_gpu_costs_one_test(tmp_path: Path) -> None:
    (tmp_path / "test_planted.py").write_text(TESTS)
    options = ("-q", "-n", "1", "-p", "no:cacheprovider", "-p", "gpu.stream", "--stream", tmp_path / "lines")
    subprocess.run(
        python("-m", "pytest", *options, "test_planted.py"),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=HANGS,
        check=False,
    )
    found = sorted((line["test"].partition("::")[2], line["outcome"]) for line in read(tmp_path / "lines"))
    assert found == [
        ("test_after", "passed"),
        ("test_before", "passed"),
        ("test_fault", "error"),  # of the worker, which ends
        ("test_fault", "failed"),
        ("test_skipped", "skipped"),
        ("test_with_a_broken_fixture", "error"),
    ]
    why = {line["outcome"]: line["why"] for line in read(tmp_path / "lines") if "why" in line}
    assert "illegal memory access" in why["failed"] and why["skipped"] == "Skipped: a reason"
    assert len(set((tmp_path / "pids").read_text().split())) == 2  # another worker after the fault


def test_an_unknown_step_is_refused_with_those_there_are(tmp_path: Path) -> None:
    done = rehearse(ROOT, tmp_path, "--steps", "smok")
    assert done.returncode == 2 and "first has no smok; use some of smoke, items, tests" in done.stderr
