"""Who is timed has been found right, what is counted can be counted by hand, and what is reported was measured."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import contestants, fit, measure, problems, records, report, run, summaries
from benchmarks.cases import CPU, Case, Moved
from benchmarks.contestants import Contestant, Runner, taking_part
from benchmarks.measure import Floor, Passes, Stage, contest, summary
from benchmarks.problems import FORWARD, OF_STATES, TOLERANCE, TOP_K, WHOLE, Problem

ROOT = Path(__file__).parent.parent
TINY = [case for case in CPU if case.name == "tiny"]
OTHERS = ("ms-swift", "NeMo-RL", "verl", "axolotl", "VeOmni", "TRL", "Liger")


def of(work: str, **changes) -> Case:
    return replace(next(case for case in TINY if case.work == work), **changes)


@pytest.fixture
def stage(monkeypatch) -> Stage:
    monkeypatch.setattr(measure, "largest_cache", lambda _: 0)
    return Stage("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.work}-{case.gradients}".strip("-"))
def test_contestants_agree_with_float64_or_are_named(case: Case, stage: Stage) -> None:
    lines = {line["contestant"]: line for line in run.measured(case, stage, 3, 0.1, None)}
    assert lines.keys() == {"floor", *(contestant.name for contestant in taking_part(case, "cpu"))}
    for name, line in lines.items():
        assert name in OTHERS or "median_ms" in line, line
        if "median_ms" in line:
            assert 0 <= line["forward_ms"] <= line["quartiles_ms"][1] + line["backward_ms"]
            assert case.work == "select" or name == "floor" or line["error"] <= TOLERANCE[case.dtype]
        else:
            assert "missing" in line  # not refused


def loss_off_by(factor: float, p: Problem) -> Runner:
    right = contestants.ids_plain(p)
    return replace(right, forward=lambda: right.forward() + factor * right.forward().detach())


def gradient_off_by(factor: float, p: Problem) -> Runner:
    right = contestants.linear_plain(p) if p.case.work == "linear" else contestants.ids_plain(p)
    last = p.leaves[-1]

    def gradients() -> list[Tensor]:
        last.grad.view(-1)[0] += factor * last.grad.abs().max()
        return [leaf.grad for leaf in p.leaves]

    return replace(right, gradients=gradients)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [loss_off_by, gradient_off_by])
def test_a_wrong_contestant_has_no_time(wrong, stage: Stage, monkeypatch) -> None:
    works = ["loss on ids"] if wrong is loss_off_by else ["loss on ids", "linear"]
    for work in works:
        rivals = [Contestant("off", work, lambda p: wrong(1e-4, p)), Contestant("right", work, lambda p: wrong(0, p))]
        ours = [contestant for contestant in contestants.CONTESTANTS if contestant.name == "topk_rkl"]
        monkeypatch.setattr(contestants, "CONTESTANTS", ours + rivals)
        gradients = "dense head" if work == "linear" else ""
        lines = {line["contestant"]: line for line in run.measured(of(work, gradients=gradients), stage, 3, 0.1, None)}
        assert "median_ms" in lines["right"]
        assert "median_ms" not in lines["off"] and "off by 1.0e-04" in lines["off"]["refused"]


def test_a_wrong_selection_has_no_time(stage: Stage, monkeypatch) -> None:
    def smallest(p: Problem) -> Runner:
        return Runner(lambda: p.teacher.topk(p.case.k, largest=False))

    def twice_the_first(p: Problem) -> Runner:
        def forward() -> tuple[Tensor, Tensor]:
            values, ids = p.teacher.topk(p.case.k)
            return values, ids[:, :1].expand_as(ids)

        return Runner(forward)

    ours = contestants.CONTESTANTS[0]
    wrong = [Contestant(f.__name__, "select", f) for f in (smallest, twice_the_first)]
    monkeypatch.setattr(contestants, "CONTESTANTS", [ours, *wrong])
    lines = list(run.measured(of("select"), stage, 3, 0.1, None))
    assert [("refused" in line, "median_ms" in line) for line in lines] == [
        (False, True), (True, False), (True, False), (False, True),
    ]  # fmt: skip


def failing(p: Problem) -> Runner:
    raise ImportError("no module of that name")


def test_a_rival_that_fails_is_missing_and_ours_is_refused(stage: Stage, monkeypatch) -> None:
    entered = [Contestant("topk_rkl", "select", failing), Contestant("rival", "select", failing)]
    monkeypatch.setattr(contestants, "CONTESTANTS", entered)
    lines = {line["contestant"]: line for line in run.measured(of("select"), stage, 3, 0.1, None)}
    assert lines["topk_rkl"]["refused"] == lines["rival"]["missing"] == "ImportError: no module of that name"
    assert "over_floor" in lines["floor"] and "over_topk_rkl" not in lines["floor"]


def test_a_backend_of_ours_that_cannot_run_here_is_missing(stage: Stage, monkeypatch) -> None:
    monkeypatch.setattr(contestants, "unavailable", lambda name: f"no {name}")
    build = partial(contestants.in_cuda, contestants.select_ours)
    monkeypatch.setattr(contestants, "CONTESTANTS", [Contestant("topk_rkl, CUDA C++", "select", build)])
    lines = {line["contestant"]: line for line in run.measured(of("select"), stage, 3, 0.1, None)}
    assert lines["topk_rkl, CUDA C++"]["missing"] == "Unavailable: no cuda"


def options(out: Path, **changes) -> Namespace:
    plain = {"suite": "cpu", "case": ["tiny"], "rounds": 3, "seconds": 0.1, "threads": 2, "against": None}
    return Namespace(**{**plain, "only_ours": True, "out": out, **changes})


def wrong_selection(p: Problem) -> Runner:
    return Runner(lambda: p.teacher.topk(p.case.k, largest=False))


def broken_while_timed(p: Problem) -> Runner:
    calls = iter(range(2))

    def forward() -> tuple[Tensor, Tensor]:
        if next(calls, None) is None:
            raise RuntimeError("out of calls")
        return p.teacher.topk(p.case.k)

    return Runner(forward)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "why"),
    [
        (wrong_selection, "Wrong: not the largest of each row"),
        (failing, "ImportError: no module of that name"),
        (broken_while_timed, "the case ended: RuntimeError: out of calls"),
    ],
    ids=["wrong", "raises", "raises while timed"],
)
def test_a_result_of_ours_that_is_refused_does_not_end_the_suite(build, why, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(measure, "largest_cache", lambda _: 0)
    others = [contestant for contestant in contestants.CONTESTANTS if contestant.work == "loss"]
    monkeypatch.setattr(contestants, "CONTESTANTS", [Contestant("topk_rkl", "select", build), *others])
    with pytest.raises(SystemExit) as end:
        run.run(options(tmp_path / "lines.jsonl"))
    assert end.value.code == f"refused:\nselect of tiny, topk_rkl: {why}"  # a text: the exit code is 1
    lines = records.load(tmp_path / "lines.jsonl")
    ours = {line["work"]: line for line in lines if line["contestant"] == "topk_rkl"}
    assert ours["select"]["refused"] == why and ours["select"]["n"] == of("select").n
    assert "median_ms" in ours["loss"]


def test_a_refused_result_has_a_place_in_the_tables(tmp_path: Path, monkeypatch) -> None:
    line = {"name": "select", "work": "select", "n": 256, "v": 1000, "k": 8, "dtype": "bfloat16", "rows": "random"}
    ours = {**line, "contestant": "topk_rkl", "refused": "Wrong: not the largest of each row"}
    times = {"forward_ms": 12.0, "backward_ms": 0.0, "median_ms": 12.34, "quartiles_ms": [12.0, 13.0]}
    lines = [ours, {**line, "contestant": "torch.topk", **times, "over_floor": 3.0}]
    (tmp_path / "gpu.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for module in (summaries, report):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    assert "| bfloat16 | refused |  | torch.topk 12.3 ms |\n" in report.cases("gpu: select")
    assert "| this package | refused: Wrong: not the largest of each row |" in report.whole("gpu")
    assert "| torch.topk |  | 12 | 0 | 12.3 | 12 to 13 |  | 3 |" in report.whole("gpu")


def test_only_ours_leaves_out_other_projects_and_torch_compile() -> None:
    kept = {c.name for case in TINY for c in taking_part(replace(case, name="select"), "cuda", only_ours=True)}
    left = {contestant.name for contestant in contestants.CONTESTANTS} - kept
    ours = {"topk_rkl", "topk_rkl, CUDA C++", "topk_rkl, overwriting", contestants.FROM_STATES}
    assert ours | {*contestants.PLAIN_TORCH} == kept
    assert {"torch.compile", "FlashInfer", "TRL", "Liger, compiled", "Fast-LLM", "verl"} < left


def test_results_of_a_changed_tree_are_not_kept_with_the_others(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    for commit in ("89f8bb8-dirty", "unknown"):
        monkeypatch.setattr(records, "commit", lambda _root, commit=commit: commit)
        with pytest.raises(SystemExit, match=f"of commit {commit}.*commit the changes first, or .*--out"):
            run.run(options(None))
    assert list(tmp_path.iterdir()) == []


def test_committed_results_are_of_a_clean_tree() -> None:
    for file in records.FOLDER.glob("*.jsonl"):
        assert {line["commit"] for line in records.load(file) if not records.is_clean(line["commit"])} == set()


def test_a_command_that_fails_or_is_not_there_says_nothing(tmp_path: Path) -> None:
    assert records.said(sys.executable, "-c", "print(7)") == "7"
    assert records.said(sys.executable, "-c", "print(7); exit(1)") == ""
    assert records.said(str(tmp_path / "nothing")) == ""


def test_who_makes_the_teacher_s_logits_is_beside_ours_that_does(stage: Stage) -> None:
    """From hidden states; the others find the teacher's K tokens ready."""

    def of_all(p: Problem) -> Runner:
        hidden, head = p.other_teacher
        return Runner(lambda: contestants.on_slots(p.hidden @ p.head.T, hidden @ head.T).mean(), p.leaves)

    case, theirs = of("linear", gradients="hidden alone"), Contestant("whole", "linear", of_all, WHOLE)
    names = ("topk_rkl", contestants.FROM_STATES)
    ours = [c for c in contestants.CONTESTANTS if c.work == "linear" and c.name in names]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contestants, "CONTESTANTS", [*ours, theirs])
        lines = {line["contestant"]: line for line in run.measured(case, stage, 3, 0.1, None)}
    on_ids, of_states, whole = (lines[name] for name in (*names, "whole"))
    for line, beside in ((of_states, on_ids), (whole, of_states)):
        assert line["over_topk_rkl"] == pytest.approx(line["median_ms"] / beside["median_ms"], rel=1e-2)


def test_the_selection_from_states_is_within_its_clock(stage: Stage, monkeypatch) -> None:
    calls: list[int] = []
    select = contestants.linear_teacher_topk
    monkeypatch.setattr(contestants, "linear_teacher_topk", lambda *given: calls.append(1) or select(*given))
    p = Problem(of("linear", gradients="hidden alone"), "cpu")
    runner = contestants.linear_ours(p, from_states=True)
    for passes in (1, 2):
        runner.forward()
        assert len(calls) == passes
    contestants.linear_ours(p).forward()
    assert len(calls) == 2


@pytest.mark.parametrize("objective", [TOP_K, OF_STATES, FORWARD, WHOLE])
def test_the_truth_from_hidden_states_is_that_of_autograd(objective: str, monkeypatch) -> None:
    monkeypatch.setattr(problems, "CHUNK_NUMBERS", 4_000)  # several chunks
    p = Problem(of("linear", gradients="dense head"), "cpu")
    hidden, head = (leaf.detach().double().requires_grad_() for leaf in p.leaves)
    teacher, teacher_head = (x.double() for x in p.other_teacher)
    slots = p.slots(objective, slice(None))
    want = problems.per_position(objective, hidden @ head.T, *slots, teacher @ teacher_head.T).mean()
    gradients = list(torch.autograd.grad(want, (hidden, head)))
    assert problems.error(p, objective, want.detach(), gradients) < 1e-12
    for i in range(2):
        off = [g.clone() for g in gradients]
        off[i][-1, -1] += 0.01 * off[i].abs().max()
        assert problems.error(p, objective, want.detach(), off) == pytest.approx(0.01)
    assert problems.error(p, objective, want.detach() * torch.nan, gradients) == torch.inf


def test_no_two_logits_tie_for_the_last_place() -> None:
    teacher = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0], [5.0, 5.0, 1.0, 0.0, 5.0]])
    problems.untie(teacher, 3)
    assert teacher.tolist() == [[1, 3, 2, 2, 0], [5, 5, 1, 0, 5]]


def test_moved_bytes_by_hand() -> None:
    n, v, k, h = 4, 100, 8, 16
    case = Case("", "select", n, v, k, h)
    slots = n * k * 8
    assert case.moved(0) == (Moved(n * v * 2, slots), Moved(0, 0))
    assert replace(case, work="loss").moved(0) == (Moved(n * v * 2 + n * k * 64, slots), Moved(slots, n * v * 2))
    on_ids = replace(case, work="loss on ids", dtype="float32")
    assert on_ids.moved(0) == (Moved(slots + n * k * 64, slots), Moved(slots, n * v * 4))
    linear = replace(case, work="linear", gradients="dense head")
    forward, backward = linear.moved(30)
    assert forward == (30 * h * 2 + n * h * 2 + slots, slots)
    assert backward == (n * h * 2 + slots, n * h * 2 + v * h * 2)
    assert replace(linear, gradients="hidden alone").moved(30)[1] == (slots, n * h * 2)


def test_the_floor_moves_what_it_says_and_no_zeros() -> None:
    floor = Floor(Moved(4_000, 400), Moved(0, 2_000), "cpu")
    assert floor.source.count_nonzero() == len(floor.source) == 1_001
    copied = []
    floor.target.fill_(7)
    floor.forward()
    copied = (floor.target != 7).sum().item()
    assert copied == 100 and torch.equal(floor.target[:100], floor.source[:100])
    floor.backward(None)
    assert (floor.target == 0).sum() == 500


def test_caches_are_filled_with_other_data() -> None:
    stage = Stage("cpu")
    assert stage.other_data.nbytes >= 4 * measure.largest_cache("cpu")
    assert stage.other_data.count_nonzero() > 0.99 * len(stage.other_data)


def test_contestants_take_turns() -> None:
    order = []

    def turn(name: str):
        return lambda: order.append(name) or Passes(1.0, 2.0)

    times = contest({"a": turn("a"), "b": turn("b")}, rounds=4, seconds=10)
    assert order == ["a", "b"] * 4 and times["a"] == [Passes(1, 2)] * 4
    order.clear()
    assert len(contest({"a": turn("a")}, rounds=9, seconds=-1)["a"]) == 3


def test_a_summary_is_of_medians_and_quartiles() -> None:
    found = summary([Passes(t, 10 * t) for t in (0.001, 0.002, 0.009)])
    assert (found["forward_ms"], found["backward_ms"], found["median_ms"]) == (2, 20, 22)
    assert found["quartiles_ms"] == [11, 99] and found["rounds"] == 3


def test_retained_bytes_are_those_that_autograd_saved() -> None:
    p = Problem(of("loss on ids"), "cpu")
    ours, plain = contestants.ids_ours(p), contestants.ids_plain(p)
    slots = p.case.n * p.case.k
    of_mean = 8  # its denominator, in float64
    assert measure.retained_bytes(ours, p) == 4 * slots + of_mean  # the gradient on the slots; the ids were given
    x = torch.randn(8, requires_grad=True)
    assert measure.retained_bytes(Runner(lambda: x.exp().sum(), [x]), p) == 32
    assert measure.retained_bytes(Runner(lambda: (x * x).sum(), [x]), p) == 0
    assert measure.retained_bytes(plain, p) > 4 * slots


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peaks_are_of_the_call() -> None:
    case, environment = of("loss on ids", n=512, v=32_000), dict(os.environ)
    peaks = measure.peaks_on_cpu(case, ["topk_rkl", "plain"])
    assert os.environ == environment  # what is set here, a child of a later test would be given
    gradient = case.n * case.v * 4
    assert peaks.keys() == {"topk_rkl", "plain"}
    assert all(gradient <= peak < 1.2 * gradient for peak in peaks.values()), peaks


def test_an_exponent_is_fitted() -> None:
    slope, factor = fit.line({size: 3 * size**1.5 for size in (1, 2, 4, 8)})
    assert slope == pytest.approx(1.5) and factor == pytest.approx(3)


def test_a_table_follows_its_results(tmp_path: Path, monkeypatch) -> None:
    line = {"name": "select", "work": "select", "n": 256, "v": 1000, "k": 8, "dtype": "bfloat16", "rows": "random"}
    ours, theirs, gone = ({**line, "contestant": name} for name in ("topk_rkl", "torch.topk", "verl"))
    lines = [{**ours, "median_ms": t, "over_floor": 2.0, "peak_bytes": 3 << 20} for t in (1.0, 9.0, 2.0)]
    lines += [{**theirs, "median_ms": 12.34, "over_topk_rkl": ratio} for ratio in (12.0, 1.4, 6.0)]
    lines += [{**gone, "missing": "ImportError"}]
    (tmp_path / "cpu.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(summaries, "FOLDER", tmp_path)
    row = "| `teacher_topk` | 256 | 1,000 | 8 | bfloat16 | 2 ms, 3 MiB | 0.50 | "
    row += "torch.topk 12.3 ms (6.0); verl missing |\n"
    text = report.filled("<!-- cases cpu: select -->\nold\n<!-- end -->")
    assert text.startswith("<!-- cases cpu: select -->\n| work |") and text.endswith(row + "<!-- end -->")


def test_a_table_has_the_faster_plain_form_and_marks_what_a_frozen_head_does_not_save(tmp_path, monkeypatch) -> None:
    line = {"name": "linear", "work": "linear", "n": 4, "v": 100, "k": 8, "h": 16, "dtype": "float32"}
    line |= {"rows": "random", "gradients": "hidden alone", "objective": TOP_K, "over_floor": 2.0}
    times = {"topk_rkl": 1.0, "plain": 3.0, "plain in float32": 2.0, "axolotl": 4.0, "Liger": 5.0}
    lines = [{**line, "contestant": name, "median_ms": time} for name, time in times.items()]
    lines[-1]["objective"] = WHOLE
    trained = [{**x, "gradients": "dense head"} for x in lines]
    (tmp_path / "cpu.jsonl").write_text("\n".join(map(json.dumps, lines + trained)))
    monkeypatch.setattr(summaries, "FOLDER", tmp_path)
    frozen_row, trained_row = report.cases("cpu: linear").splitlines()[2:]
    assert frozen_row.endswith("| plain PyTorch, all in float32 2 ms; axolotl‡ 4 ms; Liger*‡ 5 ms |")
    assert trained_row.endswith("| plain PyTorch, all in float32 2 ms; axolotl 4 ms; Liger* 5 ms |")


def test_the_picture_has_the_fastest_form_of_each_project_and_no_floor(tmp_path: Path, monkeypatch) -> None:
    line = {"work": "linear", "n": 4, "v": 100, "k": 8, "h": 16, "dtype": "float32", "rows": "random"}
    line |= {"gradients": "hidden alone", "objective": TOP_K, "peak_bytes": 3 << 20}
    times = {"topk_rkl": 1.0, "floor": 0.5, "plain": 3.0, "Liger": 5.0, "Liger, compiled": 4.0, "axolotl": 2.0}
    lines = [{**line, "name": "linear", "contestant": name, "median_ms": time} for name, time in times.items()]
    lines += [{**x, "name": "linear memory"} for x in lines[:3]] + [{**line, "name": "linear", "contestant": "TRL"}]
    lines[-1] |= {"missing": "ImportError"}
    lines += [{**x, "gradients": "dense head"} for x in lines]
    (tmp_path / "cpu.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(summaries, "FOLDER", tmp_path)
    panels = summaries.picture("cpu")
    assert [(bar.name, bar.text) for bar in panels["time"][1]] == [
        ("this package", "1 ms"), ("axolotl‡", "2 ms"), ("plain PyTorch", "3 ms"), ("Liger, compiled‡", "4 ms"),
    ]  # fmt: skip
    assert [bar.text for bar in panels["memory"][1]] == ["3 MiB in 1 ms", "3 MiB in 3 ms"]


@pytest.mark.slow
def test_equal_results_give_equal_pictures() -> None:
    plots = pytest.importorskip("benchmarks.plots", reason="matplotlib draws them", exc_type=ImportError)
    first, second = (plots.svg("cpu") for _ in range(2))
    assert first == second and b"<text" in first


def test_the_check_of_the_harness_is_not_published() -> None:
    assert {line["name"] for line in records.load(records.FOLDER / "cpu.jsonl")} >= {"tiny", "select"}
    assert "N = 24," not in report.page() and "N = 256," in report.page()


def test_held_bytes_by_hand() -> None:
    rows = report.held("1000 2000 30 4").splitlines()
    assert rows[2] == "| the student's logits | 0.00 GB | 0.00 GB | none |"
    assert "4.00 GB" in report.held("1000000 2000 30 4").splitlines()[2]
    assert rows[3].startswith("| kept for the backward pass, 4,000 numbers each |")


@pytest.mark.slow
def test_the_command_writes_lines_with_their_setting(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    command = [sys.executable, "-m", "benchmarks", "run", "--case", "tiny", "--rounds", "3", "--out", str(out)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["work"] for line in lines} == {case.work for case in TINY}
    assert all(line["device"] and line["torch"] == torch.__version__ and line["commit"] for line in lines)
