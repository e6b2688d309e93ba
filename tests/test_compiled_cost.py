"""What the kernels cost once compiled for a GPU: no spill but those named, few instructions an element of the scan."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed, so there is no kernel to compile")

import torch

from benchmarks import cuda_cost
from benchmarks.compiled_cost import CASES, CORES, FAMILIES, TARGETS, kept, loose_barriers, write
from benchmarks.phases import SELECTS
from benchmarks.sass import Loop, Sass
from tests.processes import built_for_sm_90a, can_build

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COMMITTED = json.loads((RESULTS / "compiled_cost.json").read_text())

SNIPPET = """
.L_x_0:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   STL [R1], R0 ;
.L_x_1:
        /*0020*/                   LDS R2, [R0] ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/              @!P1 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0050*/                   FMNMX R4, R4, R5, !PT ;
        /*0060*/                   LDL R0, [R1] ;
        /*0070*/                   BRA.U UP0, `(.L_x_2) ;
        /*0080*/               @P2 BRA `(.L_x_3) ;
.L_x_3:
        /*0090*/                   EXIT ;
"""


def run(*options: str, cache: Path, **env: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), **env}
    command = [sys.executable, "-m", "benchmarks.compiled_cost", *options]
    return subprocess.run(command, check=False, cwd=ROOT, env=env, capture_output=True, text=True)


def instruction_limit(record: dict[str, Any]) -> int:
    """An H100 can issue about 20 instructions in the time it reads 2 bytes, and 40 for 4."""
    half = record["dtype"] != "float32"
    whole_vectors = record["vocab"] % 16 == 0
    if record["kernel"] == "normalize":
        # The exponential of every element, with its scaling and sum, takes about ten instructions more.
        limits = (16, 20) if whole_vectors else (50, 50)
    else:
        limits = (8, 12) if whole_vectors else (16, 16)  # rows at odd addresses are loaded one element at a time
    return limits[0] if half else limits[1]


# Instructions that spill, at most, by target and K of a selection. All targets have one plan, since it is a function of
# sizes alone, and was chosen on an H200.
SPILLS = {("sm_80", 1024): 88, ("sm_100", 256): 3, ("sm_120", 256): 14}


def spill_limit(record: dict[str, Any]) -> int:
    return SPILLS.get((record["target"], record["k"]), 0) if record["kernel"] in SELECTS else 0


def spilling(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A scalar register that does not fit goes to a lane of a vector register, on gfx targets."""
    return [record for record in records if record["spills"] > spill_limit(record) or record["spilled_scalars"]]


ON_TARGETS = {"small": ["sm_90"], "few": ["sm_80", "gfx942"], "rows": ["sm_100"], "slots": ["sm_120"]}


def test_every_target_and_every_kernel_is_compiled() -> None:
    """A generation as old as sm_80, sm_90, the two that follow it, and another vendor."""
    assert {target for targets in ON_TARGETS.values() for target in targets} == set(TARGETS)
    kernels = {kernel for line in CASES["small"] for kernel in line[0]}
    assert kernels == {kernel for line in CASES["table"] for kernel in line[0]} - set(list(FAMILIES)[1:])
    assert {dtype for line in CASES["small"] for dtype in line[1]} == {torch.bfloat16, torch.float16, torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(("cases", "targets"), ON_TARGETS.items(), ids=list(ON_TARGETS))
def test_few_spills_and_few_instructions(cases: str, targets: list[str], tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    quick = [] if cases == "few" else ["--no-cycles"]  # a simulation of some is enough: of each kernel, once
    done = run("--cases", cases, "--targets", *targets, "--json", str(out), *quick, cache=tmp_path / "cache")
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    records = json.loads(out.read_text())
    assert {record["target"] for record in records} == set(targets)
    assert spilling(records) == []
    assert [record for record in records if record["loose_barriers"]] == []
    scans = [record for record in records if record["target"] == "sm_90" and record["scan_per_element"] is not None]
    assert bool(scans) == ("sm_90" in targets)
    assert [record for record in scans if record["scan_per_element"] > instruction_limit(record)] == []
    if COMMITTED[0]["triton"] == records[0]["triton"]:  # another compiler makes other code
        assert_no_dearer(records, COMMITTED)


TRITON_CASE = itemgetter("target", "kernel", "dtype", "vocab", "k", "width")


def assert_no_dearer(records: list[dict[str, Any]], committed: list[dict[str, Any]], case: Any = TRITON_CASE) -> None:
    """By a tenth, than what is committed: to accept it, write the file anew and say why in the commit."""
    before = {case(record): costs_of(record) for record in committed}
    assert before.keys() >= {case(record) for record in records}
    dearer = [
        f"{case(record)}: {name} {before[case(record)].get(name)} -> {cost}"
        for record in records
        for name, cost in costs_of(record).items()
        if cost > 1.1 * before[case(record)].get(name, cost)
    ]
    assert not dearer, dearer


def costs_of(record: dict[str, Any]) -> dict[str, float]:
    """What may not rise. Cycles are those of a row beside the other programs of a core, where they were simulated."""
    costs = {name: record[name] or 0 for name in ("registers", "shared_bytes", "scan_per_element")}
    return costs | ({"cycles": record["cycles"]["beside"]} if record.get("cycles") else {})


@pytest.mark.slow
@can_build
@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed here")
def test_the_cuda_kernels_are_no_dearer() -> None:
    committed = json.loads((RESULTS / "cuda_cost.json").read_text())
    records = [asdict(cost) for cost in cuda_cost.measure("sm_90a", ["select", "linear_loss"], built_for_sm_90a())]
    assert [record for record in records if record["spills"]] == []
    assert {record["kernel"] for record in records} == {"select_kernel", "merge_kernel", "linear_loss_kernel"}
    if committed[0]["nvcc"] == records[0]["nvcc"]:
        assert_no_dearer(records, committed, itemgetter("target", "kernel", "dtype", "variant"))


def test_only_what_is_named_spills_in_the_table() -> None:
    """And as much as is named: a limit that is too high hides what it should show."""
    assert spilling(COMMITTED) == []
    found: dict[tuple[str, int], int] = {}
    for record in COMMITTED:
        if record["spills"]:
            key = record["target"], record["k"]
            found[key] = max(found.get(key, 0), record["spills"])
    assert found == SPILLS
    assert "sm_90" not in {target for target, _ in SPILLS}


def test_a_barrier_that_does_not_wait_for_stores_is_seen() -> None:
    fenced = ";;#ASMSTART\n\ts_waitcnt vmcnt(0)\n\t;;#ASMEND\n\t.loc 1 2 3\n\ts_barrier ; memory.py\n"
    for_shared_memory = "\ts_waitcnt lgkmcnt(0)\n\ts_barrier\n"
    after_a_load = "\ts_waitcnt vmcnt(0)\n\ts_barrier\n"
    too_early = fenced.replace("\ts_barrier", "\tglobal_store_dword v0, v1, s[0:1]\n\ts_barrier")
    ttir = "tt.store %a, %b\nttg.barrier all\n"
    assert loose_barriers(ttir, for_shared_memory + fenced) == 0
    for loose in (for_shared_memory, after_a_load, too_early):
        assert loose_barriers(ttir, loose) == 1
    assert loose_barriers(ttir * 2, fenced + after_a_load) == 1


def test_a_dearer_kernel_is_seen() -> None:
    record = COMMITTED[0]
    assert_no_dearer([record], [record])
    with pytest.raises(AssertionError, match=f"registers {record['registers']} -> "):
        assert_no_dearer([record | {"registers": record["registers"] * 2}], [record])
    simulated = record | {"cycles": {"beside": 1000}}
    assert_no_dearer([record | {"cycles": {"beside": 1050}}], [simulated])
    with pytest.raises(AssertionError, match="cycles 1000 -> 1200"):
        assert_no_dearer([record | {"cycles": {"beside": 1200}}], [simulated])
    assert_no_dearer([record], [simulated])  # what is too long to simulate has none


def test_records_of_other_targets_stay(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    assert kept(file, ["sm_90"]) == []
    write([{"target": "sm_80", "k": 1}, {"target": "sm_90", "k": 2}], file)
    assert kept(file, ["sm_90"]) == [{"target": "sm_80", "k": 1}]
    assert file.read_text() == '[\n{"target": "sm_80", "k": 1},\n{"target": "sm_90", "k": 2}\n]\n'


def test_spills_and_loops_are_seen() -> None:
    sass = Sass.parse(SNIPPET)
    assert sass.names == ["S2R", "STL", "LDS", "BRA", "LDG", "FMNMX", "LDL", "BRA", "BRA", "EXIT"]
    assert sass.spills == 2
    assert sass.ranges == [range(2, 4), range(4, 8)]
    assert sass.scan_length == 4 and sass.scan_vectors == 1
    # A turn of the second loads 16 bytes, 8 elements of 2 bytes.
    assert sass.loops(2) == [Loop(2, 0, 0, 0, None), Loop(4, 128, 0, 16, 0.5)]


def test_loads_and_stores_are_as_wide_as_their_suffix() -> None:
    codes = ["LDG.E", "LDG.E.U16", "LDGSTS.E.BYPASS.128", "LDG.E.64.CONSTANT", "STG.E.U8", "FADD"]
    assert Sass._loop(codes, 4) == Loop(6, 128, 8, 30, 0.8)
    assert Sass._loop(["STG.E.128", "BRA"], 4) == Loop(2, 0, 128, 0, 0.5)


def test_what_a_core_holds() -> None:
    """Of the CUDA occupancy rules: 128 registers a thread of 8 warps leave room for two programs."""
    core = CORES["sm_90"]
    assert core.holds(8, 32, 128, 0) == 2 and core.holds(8, 32, 129, 0) == 1
    assert core.holds(4, 32, 16, 0) == 16  # 64 warps
    assert core.holds(1, 32, 16, 0) == 32  # programs
    assert core.holds(4, 32, 16, 99 << 10) == 2  # 228 KiB, 1 KiB of each taken by the driver


def test_every_kernel_is_in_the_table_for_every_target() -> None:
    kernels = {"select", "normalize", "select_loss", "support_loss", "scatter", "merge", "linear_loss"}
    kernels |= {"tail_logit", "mass_loss", "mass_grad", "linear_logits", "linear_hidden_grad", "scale_rows", *FAMILIES}
    for target in TARGETS:
        found = [record for record in COMMITTED if record["target"] == target]
        assert kernels | {"linear_weight_grad", "window_sums"} == {record["kernel"] for record in found}
        assert {(r["dtype"], r["k"]) for r in found if r["kernel"] == "select_loss"} >= {
            (dtype, k) for dtype in ("bfloat16", "float16", "float32") for k in (16, 64, 256, 1024)
        }


@pytest.mark.slow
def test_the_interpreter_is_refused(tmp_path: Path) -> None:
    done = run(cache=tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "TRITON_INTERPRET is set" in done.stderr
