"""The timed items without a GPU: every form launches, every override changes its launch, every number adds up."""

import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

import topk_rkl.backends.triton
from benchmarks import predict
from gpu.items import __main__ as command, experiments, floors, records, registry, runner, timing
from gpu.items.experiments import AS_PLANNED, DECISIONS
from gpu.items.forms import Form, Item
from gpu.items.inputs import FULL, SMALL, Inputs
from gpu.items.records import Records, measured
from gpu.items.timing import Clock
from topk_rkl import ops
from topk_rkl.backends.triton.select import select_kernel

ROOT = Path(__file__).parent.parent
SCRATCH_ARGUMENTS = [select_kernel.arg_names.index(name) for name in ("places", "taken")]
SHARED = {"device": "a CPU", "commit": "0123abc"}
H100 = "NVIDIA H100 80GB HBM3"


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Instead of being run, the launches of all Triton kernels are listed."""
    launches: list[Launch] = []

    class Recorder(NamedTuple):
        name: str

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *given, **keywords: launches.append(Launch(self.name, grid, given, keywords))

    package = topk_rkl.backends.triton
    names = [f"{package.__name__}.{found.name}" for found in pkgutil.iter_modules(package.__path__)]
    with ExitStack() as patches:
        for module in (floors, *map(importlib.import_module, names)):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patches.enter_context(mock.patch.object(module, name, Recorder(name)))
        yield launches


def launches_of(call: Callable[[], object], override: experiments.Override) -> list[Launch]:
    with recorded() as launches, override():
        call()
    return launches


def many_rows(n: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:  # (N, V) of one row of memory
    return torch.zeros(1, FULL.v, dtype=dtype).expand(n, FULL.v)


@pytest.mark.parametrize(
    ("place", "label"),
    [(place, label) for place, forms in experiments.SELECTIONS.items() for label in forms if label != AS_PLANNED],
)
def test_an_override_of_a_selection_changes_its_launch(place: int, label: str) -> None:
    forms, x = experiments.SELECTIONS[place], many_rows(2)
    call = partial(ops.select_loss, x, x, FULL.ks[place], None, None, "triton")
    (planned,), (launch,) = (launches_of(call, forms[name]) for name in (AS_PLANNED, label))
    warps, _, registers, _ = label.replace(",", "").split()
    assert (launch.keywords["num_warps"], launch.keywords["maxnreg"]) == (int(warps), int(registers))
    assert launch.keywords != planned.keywords, f"{label} is what is planned: leave it out"
    in_flight = [x.keywords["BLOCK"] / x.keywords["num_warps"] for x in (launch, planned)]
    assert in_flight[0] == in_flight[1]


def test_a_narrow_row_has_four_warps() -> None:
    x = torch.zeros(2, FULL.shard, dtype=torch.bfloat16)
    for k in FULL.ks[:2]:
        (planned,) = launches_of(partial(ops.select_loss, x, x, k, None, None, "triton"), nullcontext)
        assert (planned.keywords["num_warps"], planned.keywords["BLOCK"]) == (4, 4_096)


def test_many_rows_share_scratch() -> None:
    x = many_rows(FULL.n)
    (planned,) = launches_of(partial(ops.select_loss, x, x, 64, None, None, "triton"), nullcontext)
    assert planned.grid == (FULL.n,)
    places, taken = SCRATCH_ARGUMENTS
    assert planned.arguments[places] < FULL.n and planned.arguments[taken] is not None


@pytest.mark.parametrize("label", [label for label in experiments.HEADS if label != AS_PLANNED])
def test_an_override_of_the_head_changes_its_launch(label: str) -> None:
    hidden, values = torch.zeros(2, FULL.h, dtype=torch.bfloat16), torch.zeros(2, 32)
    ids = torch.zeros(2, 32, dtype=torch.int32)
    call = partial(ops.linear_loss, hidden, hidden, None, ids, values, None, None, True, "triton")
    (planned,), (launch,) = (launches_of(call, experiments.HEADS[name]) for name in (AS_PLANNED, label))
    assert launch.keywords != planned.keywords, f"{label} is what is planned: leave it out"
    names = {"warps": "num_warps", "columns": "SPAN", "terms": "TERMS"}
    for count, name in (part.split() for part in label.replace(",0", "0").split(", ")):
        assert launch.keywords[names[name]] == int(count)


@pytest.mark.parametrize("label", [label for label in experiments.WEIGHT_GRADS if label != AS_PLANNED])
def test_an_override_of_the_head_gradient_changes_its_launches(label: str) -> None:
    hidden, dhead = torch.zeros(64, FULL.h), torch.zeros(50, FULL.h)
    ids = torch.randint(50, (64, 32), dtype=torch.int32)
    call = partial(ops.linear_weight_grad, torch.ones(64, 32), ids, hidden, dhead, None, False, "triton")
    planned, trial = (launches_of(call, experiments.WEIGHT_GRADS[name]) for name in (AS_PLANNED, label))
    assert (
        [x.kernel for x in planned] == [x.kernel for x in trial] == ["window_sums_kernel", "linear_weight_grad_kernel"]
    )
    sizes = ("num_warps", "BLOCK")
    for before, after in zip(planned, trial, strict=True):
        changed = {name for name in sizes if before.keywords[name] != after.keywords[name]}
        words = label.replace("warps", "warp").replace("warp", "num_warps")
        assert changed == {name for name in sizes if name.lower().replace("block", "columns") in words}, changed


def test_an_override_that_lost_its_object_is_an_error() -> None:
    with (
        pytest.raises(AttributeError, match="plan_nothing"),
        experiments.returning(experiments.SELECT, "plan_nothing", lambda x: x),
    ):
        pass
    x, ids = torch.ones(16, 16), torch.zeros(16, 16, dtype=torch.int32)
    with experiments.weight_grad(colour=3), pytest.raises(TypeError, match="colour"):
        ops.linear_weight_grad(x, ids, x, torch.zeros(4, 16), None, False, "triton")


SMALL_ITEMS = registry.registry(Inputs(SMALL, "cpu"))


@pytest.mark.parametrize("item", SMALL_ITEMS, ids=lambda item: item.name)
def test_every_form_of_every_item_launches(item: Item) -> None:
    for label, form in item.forms.items():
        if form.backend == "cuda":
            continue
        with recorded() as launches:
            form.call(0)
            form.call(1)
        assert len(launches) >= 2 or form.backend != "triton", label
    torch_alone = {label for label, form in item.forms.items() if not form.backend}
    assert item.name in records.FLOORS or torch_alone <= {"torch.topk", "dense products", "plain PyTorch", "read"}


def test_the_registry_at_full_size() -> None:
    items = registry.registry(Inputs(FULL, "cpu"))  # nothing is allocated before a form is called
    by_name = {item.name: item for item in items}
    assert len(by_name) == len(items) == 56
    assert [item.name for item in items[:3]] == list(records.FLOORS)
    assert {item.decision for item in items} == {"", *DECISIONS}
    row, n, k, h = 151_936 * 2, 16_384, 32, 4_096
    moved = {name: (item.read, item.written) for name, item in by_name.items()}
    assert moved["select K 1,024"] == moved["select_loss K 64"] == moved["select float32 K 64"] == (n * row, 0)
    assert moved["select_loss of a shard K 64"] == (n * 19_072 * 2, 0)
    assert moved["copy"] == moved["loss and gradient K 64"] == moved["mass_grad K 64"] == (n * row, n * row)
    assert moved["scatter K 64"] == moved["Support K 64, loss and gradient"] == (0, n * row)
    assert moved["select K 64 N 256"] == (256 * row, 0)
    assert moved["linear_loss K 32"] == (n * k * h * 2, 0)
    assert moved["linear K 32, dhidden and dhead"] == (n * k * h * 2, 151_936 * h * 2)
    assert moved["weight_grad K 32"] == (n * h * 2, 151_936 * h * 2)
    assert list(by_name["select K 64"].forms) == ["triton", "cuda", "torch.topk"]
    assert list(by_name["linear K 32, forward with dhidden"].forms) == ["triton", "cuda", "dense products"]


def test_ids_are_spread_or_hot_as_text_has_them() -> None:
    inputs = Inputs(SMALL, "cpu")
    inputs.sizes = SimpleNamespace(n=2_000, v=12_000, row=24_000)
    spread, hot = inputs.ids(32).long(), inputs.hot_ids(32).long()  # (2,000, 32)
    for ids in (spread, hot):
        assert ids.min() >= 0 and ids.max() < 12_000
    assert (spread.diff() > 0).all()
    assert len(spread.unique()) > 11_900 and spread.flatten().bincount().max() < 30  # of 64,000 slots
    assert 900 < len(hot.unique()) <= 1_000  # a twelfth of the vocabulary
    counts = hot.flatten().bincount().sort(descending=True).values
    share = counts[0].item() / 64_000
    assert 0.01 < share < 1 / 32  # a position names an id once


def test_every_turn_of_few_rows_reads_others() -> None:
    inputs = Inputs(SMALL, "cpu")
    inputs.sizes = FULL
    for rows in FULL.few:
        parts = [registry.few(inputs, rows, i) for i in range(3)]
        assert all(part.stop - part.start == rows and part.stop <= FULL.n for part in parts)
        assert parts[0].stop <= parts[1].start and parts[1].stop <= parts[2].start
    item = registry.on_few(Inputs(SMALL, "cpu"), "select", 3, 1)
    seen = []
    with mock.patch.object(ops, "select", lambda x, *_: seen.append(x.data_ptr())):
        item.forms["triton"].call(0)
        item.forms["cuda"].call(1)
    assert len(set(seen)) == 2


def test_forms_take_turns_behind_a_busy_queue(monkeypatch) -> None:
    said, clock = [], iter(range(0, 1000, 3))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("mark")
            self.at = next(clock)

        def elapsed_time(self, end: "Event") -> float:
            assert said[-1] == "wait for all"
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: said.append(f"busy {cycles}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("wait for all"))
    calls = {name: lambda i, name=name: said.append(f"{name}{i}") for name in "ab"}
    times = Clock("cuda", 2).take_turns(calls)
    busy = f"busy {timing.WAIT}"
    turns = [word for turn in ("a2", "b3", "a4", "b5") for word in (busy, "mark", turn, "mark")]
    assert said == [*turns, "wait for all"]
    assert times == {"a": [3, 3], "b": [3, 3]}
    said.clear()
    Clock("cuda", 12).warm_up(calls["a"])
    Clock("cuda", 1).warm_up(calls["b"])
    assert said == ["a0", "a1", "wait for all", "wait for all"]


def test_the_host_is_timed_without_waiting(monkeypatch) -> None:
    said = []
    now = iter([0.0, 0.5, 1.0, 1.1] * timing.HOST_ROUNDS)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("wait"))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    times = Clock("cuda", 12).host_turns({"a": lambda i: said.append(i), "b": lambda _: None}, 5)
    assert said[:7] == [0, 1, 2, 3, 4, "wait", "wait"]
    assert times["a"] == pytest.approx([100.0] * timing.HOST_ROUNDS)
    assert times["b"] == pytest.approx([20.0] * timing.HOST_ROUNDS)


def nothing(_: int) -> None:
    return None


def item(name: str = "one", **changes: Any) -> Item:
    forms = {"triton": Form(nothing), "other": Form(nothing)}
    return Item(**{"name": name, "forms": forms, "read": 6_000_000_000, "sizes": {"n": 1}, **changes})


def test_numbers_of_an_item_by_hand() -> None:
    rates = {"read": 3e9, "fill": 2e9, "copy": 1e9}  # bytes per millisecond
    times = {"triton": [4.0, 2.0, 2.5, 3.0, 2.5], "other": [2.0, 2.0, 2.0, 2.0, 2.0]}
    found = measured(item(), times, rates, H100)
    assert found["triton"] == {
        "median_ms": 2.5, "quartiles_ms": [2.25, 3.5], "least_ms": 2.0, "repetitions": 5, "over_first": 1.0,
        "bytes": 6_000_000_000, "tb_s": 2.4, "of": "read", "share": 0.8,
    }  # fmt: skip
    assert found["other"]["over_first"] == 0.8 and found["other"]["share"] == 1.0
    both = measured(item(written=2_000_000_000), times, rates, H100)["triton"]
    assert (both["of"], both["share"], both["bytes"]) == ("read+fill", 1.2, 8_000_000_000)
    assert measured(item(read=0, written=2_000_000_000), times, rates, H100)["triton"]["of"] == "fill"
    in_turns = measured(item(floor="other"), times, {}, H100)["triton"]
    assert (in_turns["of"], in_turns["share"]) == ("other in turns", 0.8)
    assert "share" not in measured(item(), times, {}, H100)["triton"]  # no floor was measured
    assert "share" not in measured(item("read"), times, rates, H100)["triton"]
    assert measured(item(host_calls=7), times, rates, H100)["other"]["clock"] == "host"


def test_the_floor_is_that_of_the_fastest_form() -> None:
    lines = [
        {"item": "read", "bytes": 300, "median_ms": 3.0},
        {"item": "read", "bytes": 300, "median_ms": 2.0},
        {"item": "read", "bytes": 300, "median_ms": 2.5},
        {"item": "fill", "error": "RuntimeError"},
        {"item": "select K 64", "bytes": 900, "median_ms": 1.0},
    ]
    assert records.floor_rates(lines) == {"read": 150.0}


def test_a_prediction_stands_beside_what_is_planned_alone() -> None:
    items = {item.name: item for item in registry.registry(Inputs(FULL, "cpu"))}
    times = {"triton": [2.0], "cuda": [2.0], "torch.topk": [40.0]}
    found = measured(items["select K 64"], times, {}, H100)
    want = predict.expected("select", "bfloat16", 151_936, 64, 0, "H100")
    assert want is not None and found["triton"]["predicted_share"] == pytest.approx(want, rel=1e-3)
    assert "predicted_share" not in found["cuda"] and "predicted_share" not in found["torch.topk"]
    assert "predicted_share" not in measured(items["select K 64"], times, {}, "a CPU")["triton"]
    trial = items["select_loss K 64, warps and registers"]
    found = measured(trial, {label: [2.0] for label in trial.forms}, {}, H100)
    assert [label for label in found if "predicted_share" in found[label]] == [AS_PLANNED]
    head = measured(items["linear_loss K 64"], {"triton": [5.0]}, {}, H100)
    assert 0 < head["triton"]["predicted_share"] <= 1


def test_a_fault_of_the_model_does_not_cost_the_time(monkeypatch) -> None:
    monkeypatch.setattr(records, "predicted", lambda *_: 1 / 0)
    found = measured(item(), {"triton": [2.0], "other": [1.0]}, {}, H100)
    assert found["triton"]["median_ms"] == 2 and found["other"]["median_ms"] == 1
    assert found["triton"]["prediction_error"] == "ZeroDivisionError: division by zero"


def fails(_: int) -> None:
    raise RuntimeError("no such thing")


def test_what_fails_is_a_line_and_the_next_item_runs(tmp_path: Path) -> None:
    forms = {"triton": Form(fails), "other": Form(nothing), "cuda": Form(nothing, "cuda")}
    items = [item("bad", forms=forms), item("good")]
    with mock.patch.object(runner.backends, "unavailable", lambda name: f"no {name}"):
        assert runner.run(items, Records(tmp_path / "out.jsonl", SHARED), Clock("cpu", 3)) == 1
        assert runner.run([item("good")], Records(None, SHARED), Clock("cpu", 3)) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines[0] == {"item": "bad", "begun": True, **SHARED}
    assert lines[1]["error"] == "RuntimeError: no such thing" and "median_ms" not in lines[1]
    assert lines[2]["form"] == "other" and lines[2]["repetitions"] == 3 and lines[2]["over_first"] == 1
    assert lines[3]["missing"] == "no cuda" and lines[3]["took_s"] >= 0
    assert [line["item"] for line in lines[4:]] == ["good"] * 3 and lines[5]["median_ms"] >= 0


def test_a_run_goes_on_after_what_is_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    ran = []
    items = [item(name, forms={"a": Form(lambda _, name=name: ran.append(name))}) for name in ("one", "two", "three")]
    runner.run(items[:1], Records(file, SHARED), Clock("cpu", 1))
    Records(file, SHARED).begin(items[1])  # and then the process ended
    ran.clear()
    assert runner.run(items, Records(file, SHARED), Clock("cpu", 1), skip_done=True) == 1
    assert ran == ["three"]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["item"] for line in lines if "error" in line] == ["two"]
    ran.clear()
    assert runner.run(items, Records(file, SHARED), Clock("cpu", 1), skip_done=True) == 0
    assert ran == [] and len(file.read_text().splitlines()) == len(lines)


def test_a_lost_device_ends_the_process_so_that_another_goes_on(tmp_path: Path, monkeypatch) -> None:
    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    file = tmp_path / "out.jsonl"
    assert runner.run([item("one"), item("two")], Records(file, SHARED), Clock("cuda", 1)) == runner.DEVICE_LOST
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["item"] for line in lines] == ["one"] * 3
    assert all("illegal memory access" in line["error"] for line in lines[1:])


def test_the_profile_is_seven_launches_and_nothing_else(monkeypatch) -> None:
    inputs = Inputs(SMALL, "cpu")
    assert [backend for backend, _ in registry.profiled(inputs)] == ["triton"] * 5 + ["cuda"] * 2
    monkeypatch.setattr(command, "unable", lambda form: "not here" if form.backend == "cuda" else None)
    with recorded() as launches:
        assert command.profile(inputs) == 1  # two are left out
    assert [x.kernel for x in launches] == ["select_kernel"] * 3 + ["scatter_kernel", "linear_loss_kernel"]
    monkeypatch.setattr(command, "profiled", lambda inputs: registry.profiled(inputs)[:5])
    with recorded() as launches:
        assert command.profile(inputs) == 0
    assert len(launches) == 5


@pytest.mark.interpreter
@pytest.mark.slow
def test_the_command_writes_lines_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "items.jsonl"
    arguments = ["--small", "--rounds", "3", "--only", "scatter K", "--skip-done", "--out", str(out)]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "gpu.items", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    lines = [line for line in map(json.loads, out.read_text().splitlines()) if "begun" not in line]
    forms = [(line["item"], line["form"]) for line in lines]
    assert len(set(forms)) == len(forms) and {name for name, _ in forms} == {"read", "copy", "fill", "scatter K 3"}
    line = next(line for line in lines if (line["item"], line["form"]) == ("scatter K 3", "triton"))
    assert line["bytes"] == SMALL.n * SMALL.row and line["of"] == "fill" and line["share"] > 0
    assert line["repetitions"] == 3 and line["backend"] == "triton" and line["kernel"] == "scatter"
    assert {"commit", "device", "torch", "triton", "date", "took_s", "quartiles_ms", "least_ms"} <= line.keys()
