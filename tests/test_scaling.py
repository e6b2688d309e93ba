"""What ranks send is counted by hand, the parts of the model add up, and its form is checked on real processes."""

import json
import re
from dataclasses import replace
from html import unescape
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed, so there are no block sizes to count with")

from benchmarks import records
from benchmarks.scaling import cost, gloo, tables
from benchmarks.scaling.collectives import AGREED, ENTRIES, Collective, designs, ours
from benchmarks.scaling.model import (
    LINKS,
    SMALL,
    SMALL_OPERATIONS,
    STEPS,
    Link,
    chunked,
    design_seconds,
    efficiency,
    overlapped,
    parts,
    scaling,
    seconds,
)
from tests.ranks import on_ranks, together
from topk_rkl.parallel import agreement, losses

NVLINK = LINKS["NVLink"]


def sent(entry: str, ranks: int, rows: int, **options) -> list[float]:
    return [collective.sent(ranks, rows) for collective in ours(entry, ranks, **options)]


def test_bytes_by_hand() -> None:
    """Four ranks and 100 rows send three quarters of 25 rows to each; the agreement is 32 bytes of each rank."""
    told = 0.75 * 100
    assert sent("topk_reverse_kl", 4, 100, k=8) == [96, told * 8 * 5, told * 9 * 4]
    assert sent("topk_reverse_kl", 4, 100, k=8, teacher=4, student=8) == [96, told * 8 * 13, told * 9 * 8]
    assert sent("topk_reverse_kl with a Support", 4, 100, k=8) == [96, 2 * told * 16]
    assert sent("teacher_topk", 4, 100, k=8) == [96, told * 8 * 6, told * 8 * 8]
    assert sent("teacher_topk", 2, 100, k=8) == [32, 100 * 8 * 6]
    assert sent("teacher_topk", 4, 100, k=8, normalize=True)[1] == 3 * 8 * 100
    assert sent("linear_teacher_topk", 4, 100, k=8) == sent("teacher_topk", 4, 100, k=8)
    linear = "linear_topk_reverse_kl with a Support"
    assert sent(linear, 4, 100, k=8, width=64) == [96, 2 * told * 32, 2 * told * 256]
    assert sent(linear, 4, 100, k=8, width=64, hidden_grad=False) == [96, 2 * told * 32]
    assert sent(linear, 4, 100, k=8, width=64, student=8) == [96, 2 * told * 64, 2 * told * 512]
    both = [*sent("teacher_topk", 4, 100, k=8), *sent(linear, 4, 100, k=8, width=64)[1:]]
    assert sent("linear_topk_reverse_kl", 4, 100, k=8, width=64) == both


def test_rows_are_dealt_in_equal_blocks() -> None:
    dealt = Collective("all-to-all", 10, "", dealt=True)
    assert [dealt.bytes(4, rows) for rows in (0, 1, 4, 5)] == [40, 40, 40, 80]
    assert Collective("all-to-all", 10, "").bytes(4, 5) == 50


def test_one_rank_sends_nothing() -> None:
    assert all(ours(entry, 1, 8) == () for entry in ENTRIES)


def test_an_unknown_entry_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"entry is 'loss'; it must be one of teacher_topk, topk_reverse_kl, "):
        ours("loss", 2, 8)


def test_links_by_hand() -> None:
    link = Link("", 2e9, 1e9, 1e-6, 3e-6, 10e-6, 10e-6)
    assert link.latency("all-gather", 5) == pytest.approx(14e-6)
    assert link.latency("all-reduce", 2) == pytest.approx(12e-6)  # the ring
    assert link.latency("all-reduce", 64) == pytest.approx(46e-6)  # the tree
    assert link.seconds(Collective("all-to-all", 1000, ""), 2, 100) == pytest.approx(11e-6 + 50e-6)


@pytest.mark.parametrize("name", STEPS)
def test_parts_and_efficiency(name: str) -> None:
    step = STEPS[name]
    for ranks in cost.RANKS:
        found = parts(step, 151_936, ranks, 64, NVLINK)
        assert all(part.seconds >= 0 for part in found)
        assert seconds(step, 151_936, ranks, 64, NVLINK) == pytest.approx(sum(part.seconds for part in found))
        wanted = {c.what for entry in step.entries for c in ours(entry, ranks, 64, width=1)}
        assert wanted <= {part.what for part in found}
        slower = scaling(step, 151_936, ranks, 64, LINKS["InfiniBand"])
        assert slower == 1 if ranks == 1 else slower < scaling(step, 151_936, ranks, 64, NVLINK) < 1.1
    assert efficiency(8.0, 2.0, 4) == 1
    assert overlapped(step, 151_936, 8, 64, NVLINK) <= seconds(step, 151_936, 8, 64, NVLINK)


def test_the_ranks_agree_while_they_select() -> None:
    def agreed(name: str, link: Link) -> float:
        return sum(part.seconds for part in parts(STEPS[name], 151_936, 64, 64, link) if part.what == AGREED)

    of = {
        name: sum(part.seconds for part in parts(STEPS[name], 151_936, 64, 64, NVLINK) if part.what == "selection")
        for name in ("teacher_topk", "loss", "linear")
    }
    slow = Link("", 1e9, 1e12, 1e-3, 1e-3)  # a step of a ring takes longer than any selection
    whole = slow.seconds(ours("teacher_topk", 64, 64)[0], 64)
    assert agreed("support", slow) == pytest.approx(whole)
    for name in ("teacher_topk", "loss"):
        assert agreed(name, slow) == pytest.approx(whole - of[name])
    assert agreed("linear", slow) == pytest.approx(2 * whole - of["linear"])
    quick = Link("", 1e9, 1e12, 1e-9, 1e-9, 1e-9, 1e-9)
    assert agreed("loss", quick) == agreed("teacher_topk", quick) == 0 < agreed("support", quick)


def test_the_hidden_gradient_hides_behind_one_product() -> None:
    step = STEPS["heads"]
    saved = seconds(step, 151_936, 8, 64, NVLINK) - overlapped(step, 151_936, 8, 64, NVLINK)
    assert saved == pytest.approx(NVLINK.seconds(Collective("all-reduce", 2 * 4096, ""), 8))


def test_chunks() -> None:
    whole = seconds(STEPS["loss"], 151_936, 8, 256, NVLINK)
    assert chunked(151_936, 8, 256, NVLINK, 1) == pytest.approx(whole)
    free = Link("", 1, 1e30, 0, 0, 0, 0)
    more = chunked(151_936, 8, 256, free, 4) - chunked(151_936, 8, 256, free, 1)
    assert 0 <= more <= 4 * SMALL * SMALL_OPERATIONS["topk_reverse_kl"]


def test_designs() -> None:
    of = {design.name: design for design in designs(8, 64, 151_936)}
    assert sum(c.row_bytes for c in of["this package with a `Support`"].collectives) == 128
    assert sum(c.row_bytes for c in of["gather of [N, V]"].collectives) == 2 * 151_936
    assert sum(c.row_bytes for c in of["vocabulary-parallel log-softmax, as in verl"].collectives) == 12
    fastest = min(of.values(), key=lambda design: design_seconds(design, 151_936, 8, NVLINK))
    assert fastest.name == "this package with a `Support`"
    gather = of["gather of [N, V]"]
    # Its work is that of one rank, and the collective comes on top.
    assert design_seconds(gather, 151_936, 8, NVLINK) > design_seconds(gather, 151_936, 1, NVLINK)


def test_what_the_page_says_of_the_model() -> None:
    """The sentences of docs/scaling.md that compare figures of its tables."""

    def of(name: str, ranks: int, link: str, call=seconds, k: int = 64) -> float:
        return call(STEPS[name], 151_936, ranks, k, LINKS[link])

    def share(name: str, ranks: int, link: str, call=seconds) -> float:
        return efficiency(of(name, 1, link), of(name, ranks, link, call), ranks)

    assert share("heads", 8, "NVLink") < 0.95 <= share("heads", 8, "NVLink", overlapped)
    assert share("heads", 16, "NVLink") >= 0.80
    assert all(share("heads", ranks, "InfiniBand", overlapped) < aim for ranks, aim in tables.TARGETS.items())
    for name in ("teacher_topk", "loss", "support", "linear"):
        assert all(share(name, ranks, link) < aim for ranks, aim in tables.TARGETS.items() for link in LINKS), name
    assert all(of("linear", ranks, "NVLink") < of("heads", ranks, "NVLink") for ranks in cost.RANKS)
    assert share("linear", 8, "NVLink") < share("heads", 8, "NVLink")
    assert of("loss", 8, "NVLink") < 0.07 * of("heads", 8, "NVLink")
    ours_, _, verl, *_ = (design_seconds(design, 151_936, 8, NVLINK) for design in designs(8, 64, 151_936))
    assert verl > 20 * ours_
    for link in LINKS.values():
        took = {ranks: [chunked(151_936, ranks, 256, link, n) for n in (1, 2, 3, 4)] for ranks in (8, 16)}
        gains = [1 - min(times) / times[0] for times in took.values()]
        assert all(gain > 0.18 if link.name == "InfiniBand" else gain < 0.07 for gain in gains)


def test_shards_are_padded_as_trainers_do() -> None:
    assert [cost.shard(151_936, ranks) for ranks in (1, 8, 64)] == [151_936, 19_072, 2_432]


def test_the_kernels_of_shards_are_those_of_the_committed_table() -> None:
    table = {
        (r["kernel"], r["vocab"], r["k"], r["width"]): r
        for r in json.loads((records.FOLDER / "compiled_cost.json").read_text())
        if (r["target"], r["dtype"]) == ("sm_90", "bfloat16")
    }
    shards = {(r["kernel"], r["vocab"], r["k"], r["width"]): r for r in json.loads(cost.FILE.read_text())}
    assert shards.keys() == {*cost.wanted(), *cost.compared()}, "run python -m benchmarks.scaling.cost"
    both = shards.keys() & table.keys()
    assert len(both) >= 9
    for key in both:
        assert all(shards[key][field] == table[key][field] for field in cost.FIELDS), key


def test_what_was_sent_and_how_long_it_took_give_latency_and_pace() -> None:
    points = {x: 2e-4 + 3e-9 * x for x in (0.0, 1e4, 1e6, 1e8)}
    assert gloo.fitted(points) == pytest.approx((2e-4, 3e-9))


def test_a_prediction_by_hand() -> None:
    links = {"all-reduce": {"latency_s": 1e-3, "seconds_per_byte": 1e-6}}
    found = (Collective("all-reduce", 10, ""), Collective("all-reduce", 20, ""))
    assert gloo.predicted(0.5, found, 2, 100, links) == pytest.approx(0.5 + 2e-3 + 3e-3)
    assert gloo.slowest([[1, 5], [2, 4]]) == [2, 5]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shares_are_the_whole_vocabulary(ranks: int) -> None:
    assert [i for rank in range(ranks) for i in gloo.share(10, ranks, rank)] == list(range(10))


def received(group, kind: str) -> torch.Tensor:
    """What a stand-in gives, beside what the collective gives: their shapes."""
    x = torch.zeros(2, 6)
    functional = gloo.functional
    calls = {
        "all_reduce": lambda: functional.all_reduce(x, "sum", group),
        "all_to_all_single": lambda: functional.all_to_all_single(x, None, None, group),
        "all_gather_tensor": lambda: functional.all_gather_tensor(x, 0, group),
    }
    real = functional.wait_tensor(calls[kind]())
    with mock.patch.multiple(functional, **gloo.left_out(2)):
        return real.shape, functional.wait_tensor(calls[kind]()).shape


@together
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all_reduce", "all_to_all_single", "all_gather_tensor"])
def test_a_collective_that_is_left_out_gives_what_fits(kind: str) -> None:
    for real, stand_in in on_ranks(2, received, kind):
        assert real == stand_in


def tensors_sent(group, case: gloo.Case) -> list[tuple[str, int]]:
    """The kind and the bytes of every collective of a call, as `Collective.bytes` counts them."""
    work, ranks, found = gloo.call(case, group), dist.get_world_size(group), []

    def counted(name: str, kind: str, copies: int = 1):
        real = getattr(gloo.functional, name)
        return lambda x, *rest: found.append((kind, copies * x.nbytes)) or real(x, *rest)

    kinds = {"all_reduce": "all-reduce", "all_to_all_single": "all-to-all"}
    wrapped = {name: counted(name, kind) for name, kind in kinds.items()}
    gathers = [name for name in ("all_gather_single", "all_gather_tensor") if hasattr(gloo.functional, name)]
    wrapped[gathers[0]] = counted(gathers[0], "all-gather", ranks)
    with mock.patch.multiple(gloo.functional, **wrapped):
        work()
    return found


@together
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("case", gloo.TINY, ids=lambda case: case.entry)
def test_the_bytes_stated_are_those_that_the_code_sends(case: gloo.Case, ranks: int) -> None:
    stated = [(c.kind, c.bytes(ranks, case.n)) for c in ours(case.entry, ranks, case.k, width=case.h)]
    assert len(stated) >= 2
    assert all(sent == stated for sent in on_ranks(ranks, tensors_sent, case))


class Counting(TorchDispatchMode):
    """Counts what a GPU would run a kernel for: no view, no constant, none of the package's own ops."""

    FREE = (
        *("view", "detach", "slice", "split", "transpose", "expand", "unsqueeze", "select", "scalar_tensor", "alias"),
        *("permute", "unbind"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.counted = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        self.counted += op.namespace == "aten" and not name.startswith(self.FREE) and "empty" not in name
        return op(*args, **(kwargs or {}))


def operations(group, case: gloo.Case) -> int:
    """As on a GPU, where nothing is read on the host."""
    work = gloo.call(case, group)
    unread = [mock.patch.object(module, "read_on_host", return_value=False) for module in (agreement, losses)]
    with unread[0], unread[1], Counting() as mode:
        work()
    return mode.counted


@together
@pytest.mark.slow
@pytest.mark.parametrize("case", gloo.TINY, ids=lambda case: case.entry)
def test_the_code_has_about_as_many_small_operations_as_the_model(case: gloo.Case) -> None:
    case = replace(case, n=9)  # rows that 3 ranks own in equal parts
    [alone], [shared, *_] = on_ranks(1, operations, case), on_ranks(3, operations, case)
    assert shared - alone == pytest.approx(SMALL_OPERATIONS[case.entry], abs=2)  # torch versions differ


@together
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_harness_predicts_every_call(ranks: int) -> None:
    lines = list(gloo.lines((ranks,), gloo.TINY, gloo.SIZES[:2], 3))
    calls = [line for line in lines if line["name"] == "call"]
    assert [line["entry"] for line in calls] == [case.entry for case in gloo.TINY]
    for line in calls:
        assert 0 < line["local_ms"] <= line["predicted_ms"] and line["median_ms"] > 0
        assert (line["local_ms"] < line["predicted_ms"]) == (ranks > 1)
    assert len(lines) - len(calls) == (3 if ranks > 1 else 0)


def test_an_error_is_relative_to_what_was_measured() -> None:
    assert tables.error({"ranks": 2, "predicted_ms": 9.0, "median_ms": 10.0}) == "-10 %"
    assert tables.error({"ranks": 1, "predicted_ms": 9.0, "median_ms": 10.0}) == ""


def test_the_committed_runs_are_of_every_call_on_one_to_four_ranks() -> None:
    calls = [line for line in tables.measured() if line["name"] == "call"]
    assert {(line["entry"], line["ranks"]) for line in calls} == {
        (case.entry, ranks) for case in gloo.CASES for ranks in gloo.WORLDS
    }
    assert {line["commit"] for line in calls} == {calls[0]["commit"]} and records.is_clean(calls[0]["commit"])


def test_nothing_measured_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    assert tables.check("") == tables.gloo_links("") == tables.NONE


def test_the_picture_names_what_it_shows() -> None:
    text = unescape((records.FOLDER / "scaling.svg").read_text())
    for label in ("both heads and the loss, NVLink", "the loss alone, from logits, InfiniBand", "gather of [N, V]"):
        assert re.search(rf"<text[^>]*>{re.escape(label)}</text>", text), label


@pytest.mark.slow
def test_the_picture_is_that_of_the_model() -> None:
    picture = pytest.importorskip("benchmarks.scaling.picture", reason="matplotlib draws it", exc_type=ImportError)
    first, second = (picture.svg() for _ in range(2))
    assert first == second

    def drawn(text: str) -> list[str]:
        return re.findall(r"<text[^>]*>([^<]*)</text>", text)

    assert drawn(first.decode()) == drawn(picture.FILE.read_text()), "run python -m benchmarks report"
