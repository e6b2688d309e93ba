"""The simulation of compiled code: what it decodes, the path it follows, and cycles that a hand can count."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there is no kernel to compile")

from benchmarks import phases, simulate
from benchmarks.sass import Control, Sass
from benchmarks.simulate import BARRIER, FAR, NEAR, PORT, READ, path, run
from topk_rkl.backends.triton.launch import IDLE_BITS

# Of select at K = 64 for sm_90, by Triton 3.7.1, when it still took a turn for every bit of a key.
BISECTION = (Path(__file__).parent / "bisection.sass").read_text()


def encoded(stall: int = 1, result: int = 7, operands: int = 7, waits: int = 0) -> str:
    """The line of the upper half of an encoding."""
    return f"/* 0x{(stall | result << 5 | operands << 8 | waits << 11) << 41:016x} */"


def kernel(*lines: str) -> Sass:
    """Of labels, and of instructions with the keywords of their encoding: "LDS R1, [R2] | result=0"."""
    text = []
    for i, line in enumerate(lines):
        if line.startswith(".L_"):
            text.append(f"{line}:")
            continue
        instruction, _, control = line.partition(" | ")
        fields = {key: int(value, 0) for key, value in (field.split("=") for field in control.split())}
        text += [f"/*{16 * i:04x}*/  {instruction} ;  /* 0x{0:016x} */", encoded(**fields)]
    return Sass.parse("\n".join(text))


def loop(label: str, *body: str) -> list[str]:
    return [f".L_{label}", *body, f"@P0 BRA `(.L_{label})"]


def test_control_codes_of_a_compiled_kernel() -> None:
    """Encodings of select_kernel: a result on a scoreboard, a wait for one, operands on one."""
    assert Control.decode(0x000EA20000002100) == Control(stall=1, result=2)  # S2R
    assert Control.decode(0x002FC8000FF1E03F) == Control(stall=4, waits=(1,))  # behind S2UR
    assert Control.decode(0x000FE80000010000) == Control(stall=4)  # BAR
    sass = Sass.parse(BISECTION)
    assert len(sass.codes) == 77 and sass.ranges == [range(76)]
    controls = [x.control for x in sass.instructions]
    popc, redux = sass.names.index("POPC"), sass.names.index("REDUX")
    assert controls[popc] == Control(2, result=0) and controls[redux] == Control(2, result=0, waits=(0,))
    assert controls[redux + 1] == Control(5, waits=(0,))


def test_fields_of_a_control_code_do_not_overlap() -> None:
    sass = kernel("LDG.E R1, [R2] | stall=13 result=4 operands=1 waits=0x29", "EXIT")
    assert sass.instructions[0].control == Control(13, result=4, operands=1, waits=(0, 3, 5))
    assert sass.instructions[1].control == Control(1)


def test_loops_turn_as_often_as_said() -> None:
    sass = kernel(".L_x_1", "MOV", ".L_x_2", "NOP", "@P0 BRA `(.L_x_2)", "BRA.U UP1, `(.L_x_1)", "EXIT")
    once = [0, *[1, 2] * 3, 3]
    assert path(sass, {2: 3, 3: 2}) == [*once, *once, 4]
    assert path(sass, {}) == [0, 1, 2, 3, 4]


def test_a_loop_that_ends_by_an_exit() -> None:
    sass = kernel("MOV", ".L_x_1", "NOP", "@P0 EXIT", "BRA `(.L_x_1)", "EXIT")
    assert path(sass, {3: 2}) == [0, 1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("short_first", [True, False])
def test_of_two_ends_the_longer_is_followed(short_first: bool) -> None:
    """A row of weight 0 stores zeros and ends, before or behind what serves all others."""
    ways = [["STG.E", "EXIT"], ["LDG.E", "IADD3", "STG.E", "EXIT"]]
    first, second = ways if short_first else ways[::-1]
    sass = kernel("@P0 BRA `(.L_x_1)", *first, ".L_x_1", *second)
    followed = [sass.names[i] for i in path(sass, {})]
    assert followed == ["BRA", "LDG", "IADD3", "STG", "EXIT"]


@pytest.mark.parametrize("short_first", [True, False])
def test_of_two_ways_that_meet_again_the_longer_is_followed(short_first: bool) -> None:
    ways = [["FSEL"], ["DFMA", "DFMA", "DFMA"]]
    first, second = ways if short_first else ways[::-1]
    sass = kernel("@P0 BRA `(.L_x_1)", *first, "BRA `(.L_x_2)", ".L_x_1", *second, ".L_x_2", "EXIT")
    followed = [name for name in (sass.names[i] for i in path(sass, {})) if name != "BRA"]
    assert followed == ["DFMA", "DFMA", "DFMA", "EXIT"]


def test_every_turn_takes_the_same_way() -> None:
    slow, both = (
        ["@P6 BRA P5, `(.L_x_1)", "CALL", ".L_x_1"],
        ["DFMA", "DADD", "BRA `(.L_x_3)", ".L_x_2", "FSEL", ".L_x_3"],
    )
    sass = kernel(*loop("x_0", *slow, "@P0 BRA `(.L_x_2)", *both, "MOV"), "EXIT")
    once = [0, 2, 3, 4, 5, 7, 8]
    assert path(sass, {8: 2}) == [*once, *once, 9]


def test_a_call_is_skipped_and_a_masked_load_is_not() -> None:
    slow = kernel("@P6 BRA P5, `(.L_x_1)", "MOV", "CALL.REL.NOINC", ".L_x_1", "EXIT")
    assert path(slow, {}) == [0, 3]
    masked = kernel("@P6 BRA `(.L_x_1)", "LDG.E", ".L_x_1", "EXIT")
    assert path(masked, {}) == [0, 1, 2]


def test_code_that_is_laid_out_behind_the_end_comes_back() -> None:
    sass = kernel("BRA `(.L_x_2)", ".L_x_1", "STG.E", "EXIT", ".L_x_2", "LDG.E", "BRA `(.L_x_1)")
    assert path(sass, {}) == [0, 3, 4, 1, 2]


def issued(sass: Sass, warps: int = 1, **options) -> list[list[int]]:
    return run(sass, path(sass, {}), warps, **options)


def test_stalls_and_latencies_of_one_warp() -> None:
    sass = kernel("IADD3 | stall=4", "LDS | stall=2 result=0", "FADD | waits=1 stall=5", "EXIT")
    arrives = 4 + 1 + simulate.LATENCY["LDS"]  # one cycle of the memory unit
    assert issued(sass) == [[0, 4, arrives, arrives + 5]]


def test_operands_are_free_before_the_result_is_there() -> None:
    sass = kernel("LDG.E | result=0 operands=1", "MOV | waits=2", "FADD | waits=1", "EXIT")
    assert issued(sass) == [[0, 1 + READ, 1 + NEAR, 2 + NEAR]]
    assert issued(sass, far={0}) == [[0, 1 + READ, 1 + FAR, 2 + FAR]]


def test_warps_of_one_scheduler_share_its_units() -> None:
    """Warp 4 waits for warp 0: two cycles for integers, one for additions, eight for the special unit."""
    for code, pace in (("IADD3", 2), ("FADD", 1), ("MUFU.EX2", 8)):
        sass = kernel(f"{code} | stall=9", "EXIT")
        assert issued(sass, warps=4)[0][0] == 0
        assert issued(sass, warps=5)[0][0] == pace


def test_schedulers_share_the_memory_unit() -> None:
    """Four warps read 16 bytes per thread each: four cycles per warp, and the last has its result last."""
    sass = kernel("LDS.128 | result=0", "FADD | waits=1", "EXIT")
    assert issued(sass, warps=4)[0][1] == 4 * 4 + simulate.LATENCY["LDS"]


def test_loads_arrive_at_the_pace_of_the_port() -> None:
    lines = ["LDG.E.128 | stall=2 result=0"] * 64 + ["FADD | waits=1", "EXIT"]
    first = 4 + FAR  # after four cycles of the memory unit
    assert issued(kernel(*lines), far=range(64))[0][64] == first + 63 * 512 // PORT


def test_a_barrier_waits_for_the_last_warp() -> None:
    sass = kernel("MUFU.EX2", "BAR.SYNC", "FADD | stall=5", "EXIT")
    assert issued(sass, warps=1) == [[0, 1, 1 + BARRIER, 6 + BARRIER]]
    late = 8 + 1  # the second warp of a scheduler
    assert issued(sass, warps=5)[0][1:3] == [late, late + BARRIER + 1]  # and two warps add after each other
    other = issued(sass, warps=1, starts=(0, 100))
    assert other == [[0, 1, 1 + BARRIER, 6 + BARRIER], [100, 101, 101 + BARRIER, 106 + BARRIER]]


@pytest.mark.parametrize(("warps", "counted"), [(8, 499), (16, 746)])
def test_a_turn_of_the_bisection_as_counted_by_hand(warps: int, counted: int) -> None:
    """By hand from the control codes: 9.1 us for 32 turns of 8 warps at 1.755 GHz, and 13.6 us of 16 warps.

    The code that was compiled for 16 warps has one shuffle more per turn.
    """
    sass = Sass.parse(BISECTION)
    few, many = (run(sass, path(sass, {75: turns}), warps)[0][-1] for turns in (2, 10))
    assert (many - few) / 8 == pytest.approx(counted, rel=0.1)


class Case(NamedTuple):
    """The sizes of a launch of `select` or `linear_loss`."""

    kernel: str
    dtype: torch.dtype = torch.bfloat16
    vocab: int = 1000
    k: int = 40
    width: int = 1024


STREAM = ["LDG.E.128 | result=0", "HMNMX2 | waits=1", "STG.E.U16"]
SEARCH = ["BAR.SYNC", "POPC", "LDS"]
PICK = ["STG.E", "IADD3"]


def test_turns_by_what_a_loop_does() -> None:
    select = kernel(
        *loop("scan", *STREAM), *loop("first", *SEARCH), *loop("pick", *PICK), *loop("second", *SEARCH), "EXIT"
    )
    first, second = phases.search_turns(Case("select"))
    assert phases.turns(Case("select"), {"BLOCK": 100}, select) == {3: 10, 7: first, 10: 2, 14: second}
    claim = loop("claim", "ATOMG.E.CAS", "BAR.SYNC")  # of a place, which is free in the first turn
    claiming = kernel(*claim, *loop("scan", *STREAM), *loop("search", *SEARCH), "EXIT")
    assert phases.turns(Case("select"), {"BLOCK": 100}, claiming) == {6: 10, 10: second}
    head = kernel(*loop("slots", *loop("columns", *STREAM)), *loop("spans", *loop("terms", *STREAM)), "EXIT")
    blocks = {"SLOTS": 16, "BLOCK": 256, "TERMS": 4, "SPAN": 512}
    assert phases.turns(Case("linear_loss"), blocks, head) == {3: 4, 4: 3, 8: 10, 9: 2}


def test_a_bisection_by_hand() -> None:
    keys = torch.tensor([9, 9, 8, 4, 0], dtype=torch.int32)
    assert phases.bisected(keys, None, 4) == (3, 1)  # of 3 and 6, just four reach 3
    assert phases.bisected(keys, None, 1) == (9, 3)  # 3 and 6, 7 and 8, then 9, which two share
    assert phases.bisected(keys, 9, 2) == (9, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [16, 64, 256])
def test_a_bisection_finds_the_kth_largest_in_few_turns(k: int, dtype: torch.dtype) -> None:
    case = Case("select", dtype, vocab=20_000, k=k)
    logits = torch.randn(20_000).to(dtype)
    keys = phases.keys(logits, IDLE_BITS[dtype])
    threshold, turns = phases.bisected(keys, None, k)
    assert (keys >= threshold).sum() >= k >= (keys > threshold).sum()
    assert 0 < turns <= 8 * dtype.itemsize
    assert 0 < sum(phases.search_turns(case)) <= 8 * dtype.itemsize  # of both


def test_more_loops_than_expected_are_an_error() -> None:
    three = kernel(*loop("scan", *STREAM), *(line for i in range(3) for line in loop(f"s{i}", *SEARCH)), "EXIT")
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        phases.turns(Case("select"), {"BLOCK": 100}, three)


def test_phases_add_up_and_programs_share_a_core(monkeypatch) -> None:
    monkeypatch.setattr(phases, "search_turns", lambda _: [20, 20])
    sass = kernel(*loop("scan", *STREAM), *loop("first", *SEARCH), *loop("second", *SEARCH), "NOP | stall=9", "EXIT")
    launch = {"BLOCK": 100, "num_warps": 8}
    one, four = (phases.measure(Case("select"), launch, sass, programs) for programs in (1, 4))
    assert one and four and one.beside == one.alone == four.alone
    assert one.scan > 10 * FAR and one.search > sum(phases.search_turns(Case("select"))) * BARRIER
    assert 9 <= one.alone - one.scan - one.search < 9 + 2 * BARRIER
    assert one.alone < four.beside < 4 * one.alone


def test_what_takes_minutes_is_not_simulated(monkeypatch) -> None:
    sass = kernel(*loop("scan", *STREAM), *loop("first", *SEARCH), *loop("second", *SEARCH), "EXIT")
    monkeypatch.setattr(phases, "LONGEST", 50)
    assert phases.measure(Case("select"), {"BLOCK": 100, "num_warps": 8}, sass, 1) is None
