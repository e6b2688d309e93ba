"""The cycles of compiled code on one core, by a simulation of its warps. No constant here was measured.

`predict.SLOWER` says how many more a GPU took.

What is simulated: four schedulers that issue one instruction per cycle each, the oldest ready warp first; the stall
count, the scoreboards and the wait mask of every instruction; the pace of each kind of unit; the port through which
loads arrive; barriers. The pace of units is that of the CUDA programming guide (throughput of native arithmetic
instructions, compute capability 9.0). Latencies that no control code holds are round numbers of the size that
microbenchmarks publish: arXiv 2402.13499 for the memory of an H100, arXiv 2004.05371 for barriers and shuffles.

What is left out: instruction caches, bank conflicts, address translation, the start of a program, and values. So all
warps take one path, whose loops turn as often as the caller says.
"""

import heapq
from collections.abc import Collection, Sequence
from dataclasses import replace

from benchmarks.sass import Control, Instruction, Sass, load_bits, moved_bits

FAR = 700  # cycles to memory, partly busy
NEAR = 270  # to the second-level cache
BARRIER = 20  # from the last arrival on
READ = 8  # until an instruction that goes to memory has read its operands
PORT = 64  # bytes per cycle that reach a core

SCHEDULERS = 4
UNITS = ("integer", "multiply", "special", "double", "uniform", "memory", "none")
# Unit, and the cycles for which an instruction of one warp occupies that of a scheduler. All others are integer, 2.
KINDS = {
    **dict.fromkeys(("FFMA", "FADD", "FMUL", "HFMA2"), ("multiply", 1)),
    "IMAD": ("multiply", 2),
    **dict.fromkeys(("MUFU", "POPC", "FLO", "BREV", "F2F", "F2I", "I2F"), ("special", 8)),
    **dict.fromkeys(("DFMA", "DADD", "DMUL", "DSETP"), ("double", 2)),
    **dict.fromkeys(("LDG", "STG", "LDS", "STS", "LDSM", "STSM", "SHFL", "REDUX"), ("memory", 2)),
    **dict.fromkeys(("LDC", "LDCU", "S2R", "S2UR", "R2UR", "LDGSTS", "ATOMG"), ("memory", 2)),
    **dict.fromkeys(("BRA", "EXIT", "BSSY", "BSYNC", "BAR", "NOP", "WARPSYNC"), ("none", 1)),
}
LATENCY = {"LDS": 29, "LDSM": 33, "SHFL": 23, "REDUX": 22, "LDC": 35, "LDCU": 35, "S2R": 24, "S2UR": 30, "R2UR": 12}
OTHER_LATENCY = 20  # of the special units, and of double precision where it holds a scoreboard


def path(sass: Sass, turns: dict[int, int]) -> list[int]:
    """The instructions in the order in which a warp issues them. `turns` are those of the loop that a branch closes.

    A branch back to what has not run yet closes no loop: code that seldom runs is laid out behind the end.
    """
    instructions = sass.instructions
    left: dict[int, int] = {}
    visited: set[int] = set()
    steps = []
    i = 0
    while True:
        instruction, target = instructions[i], instructions[i].target
        steps.append(i)
        visited.add(i)
        if instruction.name == "EXIT" and not instruction.conditional:
            return steps
        if target is None:
            i += 1
        elif target <= i and target in visited:
            left[i] = left.get(i, turns.get(i, 1)) - 1
            if left[i] == 0:
                del left[i]
                if not instruction.conditional:  # nothing follows it
                    return steps
            i = target if i in left else i + 1
        else:
            i = target if not instruction.conditional or _skips(instructions, i) else i + 1


def _skips(instructions: list[Instruction], i: int) -> bool:
    """Whether a conditional branch to what comes later is taken.

    One past a call is: the slow way of a division. Where the two ways part for good the longer is followed: the other
    serves a row of weight 0, or a logarithm of what is not positive. What else some rows skip is followed.
    """
    target = instructions[i].target
    assert target is not None
    between = instructions[i + 1 : target]
    if len(between) < 32 and any(x.name == "CALL" for x in between):
        return True
    if not any(x.name == "EXIT" and not x.conditional for x in between) and not any(map(_ends, between[-1:])):
        return False
    other, join = _length(instructions, target), between[-1].target
    if join is not None and join > target:
        other = min(other, join - target)
    return other > _length(instructions, i + 1)


def _ends(instruction: Instruction) -> bool:
    """Whether the next instruction never follows."""
    return instruction.name in ("BRA", "EXIT") and not instruction.conditional


def _length(instructions: list[Instruction], start: int) -> int:
    return next(i for i in range(start, len(instructions)) if _ends(instructions[i])) - start


def run(
    sass: Sass,
    steps: Sequence[int],
    warps: int,
    starts: Sequence[int] = (0,),
    far: Collection[int] = (),
) -> list[list[int]]:
    """Programs of one core, each started at a cycle of its own.

    Returns for each the cycle in which the last of its warps issued each step. Loads of `far` go to memory, all others
    to the second-level cache.
    """
    kinds = [_kind(x, FAR if i in far else NEAR) for i, x in enumerate(sass.instructions)]
    issued = [[0] * len(steps) for _ in starts]
    step = [0] * (warps * len(starts))
    scoreboards = [[0] * 6 for _ in step]
    scheduler = [0] * SCHEDULERS  # the cycle from which each is free, as below
    unit = [[0] * len(UNITS) for _ in scheduler]
    memory_unit = port = 0
    arrived: list[list[int]] = [[] for _ in starts]
    ready = [(starts[warp // warps], warp) for warp in range(len(step))]
    heapq.heapify(ready)
    while ready:
        now, warp = ready[0]
        program, at, boards = warp // warps, step[warp], scoreboards[warp]
        kind, pace, latency, width, arriving, control, is_barrier = kinds[steps[at]]
        mine = warp % SCHEDULERS
        when = max(now, scheduler[mine], unit[mine][kind], *(boards[i] for i in control.waits))
        if when > now:
            heapq.heapreplace(ready, (when, warp))
            continue
        scheduler[mine] = now + 1
        unit[mine][kind] = now + pace
        done = read = now + latency
        if width:
            memory_unit = max(memory_unit, now) + width
            done, read = memory_unit + latency, memory_unit + READ
            if arriving:
                port = max(port, memory_unit + latency - arriving) + arriving
                done = port
        if control.result is not None:
            boards[control.result] = max(boards[control.result], done)
        if control.operands is not None:
            boards[control.operands] = max(boards[control.operands], read)
        issued[program][at] = now
        step[warp] = at + 1
        if at + 1 == len(steps):
            heapq.heappop(ready)
        elif not is_barrier:
            heapq.heapreplace(ready, (now + control.stall, warp))
        else:
            heapq.heappop(ready)
            arrived[program].append(warp)
            if len(arrived[program]) == warps:
                for waiting in arrived[program]:
                    heapq.heappush(ready, (now + max(BARRIER, control.stall), waiting))
                arrived[program].clear()
    return issued


def _kind(instruction: Instruction, load_latency: int) -> tuple[int, int, int, int, int, Control, bool]:
    """Unit, its pace, latency, cycles of the memory unit that all warps share and of the port, and two facts more."""
    name, code = instruction.name, instruction.code
    unit, pace = KINDS.get(name, ("uniform" if name.startswith("U") else "integer", 2))
    bits = load_bits(code)
    latency = load_latency if bits or name == "ATOMG" else LATENCY.get(name, OTHER_LATENCY)
    width = 0
    if unit == "memory":
        width = 2 if name == "REDUX" else max(1, moved_bits(code) // 32)
    control = replace(instruction.control, stall=max(1, instruction.control.stall))
    return UNITS.index(unit), pace, latency, width, bits * 4 // PORT, control, name == "BAR"
