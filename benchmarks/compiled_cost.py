"""What the Triton kernels cost once compiled, for any target and without a GPU.

    python -m benchmarks.compiled_cost [--targets sm_90 gfx942] [--cases rows|slots|few|small|table|full] [--json FILE]

The launchers are called on CPU tensors under a driver that compiles and never launches, so every block size, option
and argument specialisation is the one a real call gets. `--cases table --json benchmarks/results/compiled_cost.json` is
what is committed; the tests compile the smaller ones, which are parts of it, and allow a tenth more. Records of other
targets stay in the file. For sm_90 and sm_100 the cycles of kernels are simulated besides (`phases`).
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks import phases
from benchmarks.phases import SELECTS, Cycles
from benchmarks.sass import Loop, Sass
from tests.direct import Direct
from topk_rkl.backends import triton as backend
from topk_rkl.backends.triton.memory import INTERPRETED
from topk_rkl.backends.triton.scatter import merged
from topk_rkl.divergence import REVERSE_CODE, AlphaBeta, JensenShannon

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ROWS = 9  # more than a core has places for

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SLOTS = ("support_loss", "scatter", "merge")
FAMILIES = {
    "support_loss": REVERSE_CODE,
    "support_loss of Jensen-Shannon": JensenShannon().code,
    "support_loss of alpha-beta": AlphaBeta(0.5, 0.5).code,
}
MASSES = ("tail_logit", "mass_loss", "mass_grad")
kernels = Direct(backend)
HEADS = ("linear_loss", "linear_weight_grad")
HALVES = ("linear_logits", "linear_hidden_grad", "scale_rows")  # of linear_loss, and its backward pass
# Each line is a product: kernels, dtypes, vocabularies, K, and H where there are hidden states. Rows of 4099 and 50257
# may start at any address.
ROW_KERNELS = [
    (("select_loss",), (BF16,), (151936,), (64,)),
    (("normalize",), (FP32,), (151936,), (1024,)),
]
SLOT_KERNELS = [
    (SLOTS, (BF16,), (151936,), (64,)),
    (HEADS, (FP32,), (151936,), (1024,), (4096,)),
]
CASES = {
    "rows": ROW_KERNELS,
    "slots": SLOT_KERNELS,
    "few": [*ROW_KERNELS, *SLOT_KERNELS],
    "small": [
        (("select_loss",), (BF16,), (151936,), (1, 64, 256)),
        (("select_loss",), (FP32,), (4099,), (1024,)),
        (("select",), (FP16,), (32000,), (64,)),
        (("normalize",), (FP32,), (151936,), (64,)),
        (("normalize",), (BF16,), (50257,), (64,)),
        (("select_loss", "normalize"), (BF16,), (19072,), (64,)),
        (("support_loss",), (BF16,), (151936,), (1024,)),
        ((*SLOTS, *MASSES), (BF16,), (151936,), (64,)),
        (HEADS, (BF16,), (151936,), (64,), (4096,)),
        (HEADS, (FP32,), (151936,), (1024,), (4096,)),
        (HALVES, (BF16,), (151936,), (64,), (4096,)),
    ],
    "table": [
        (SELECTS, (BF16, FP16, FP32), (151936,), (16, 64, 256, 1024)),
        (SELECTS, (BF16,), (151936,), (32,)),
        (SELECTS, (BF16, FP16, FP32), (50257,), (64,)),
        ((*SLOTS, *MASSES), (BF16, FP16, FP32), (151936,), (64, 1024)),
        (tuple(FAMILIES), (BF16,), (151936,), (64, 1024)),
        (HEADS, (BF16, FP16, FP32), (151936,), (64, 1024), (4096,)),
        (HEADS, (BF16,), (151936,), (32,), (4096,)),
        (HALVES, (BF16, FP32), (151936,), (64,), (4096,)),
    ],
    "full": [
        (SELECTS, (BF16, FP16, FP32), (4099, 32000, 49152, 151936, 262144), (1, 16, 64, 256, 1024)),
        (("normalize", "select_loss"), (BF16, FP32), (50257, 262208), (16, 64, 256, 1024)),
        (SLOTS, (BF16, FP16, FP32), (4099, 151936), (1, 16, 64, 256, 1024)),
        (HEADS, (BF16, FP16, FP32), (151936,), (1, 16, 64, 256, 1024), (70, 1024, 2048, 4096, 8192)),
    ],
}


class Case(NamedTuple):
    """One call of one launcher."""

    kernel: str
    dtype: torch.dtype
    vocab: int
    k: int
    width: int = 0


@dataclass(frozen=True)
class Cost:
    """What one compiled kernel uses.

    A spill goes to memory: instructions that do so on sm targets, registers on gfx targets. There a scalar register
    that does not fit goes to a lane of a vector register instead, which costs an instruction and no memory. Only on gfx
    targets does a barrier not wait for stores.
    """

    triton: str
    target: str
    kernel: str
    dtype: str
    vocab: int
    k: int
    width: int
    warps: int
    registers: int
    spills: int
    spilled_scalars: int
    shared_bytes: int
    programs: int  # on a core at a time, at most
    instructions: int | None
    loops: list[Loop]
    scan_per_element: float | None
    loose_barriers: int  # of the kernel's own, those that do not wait for stores
    cycles: Cycles | None


@dataclass(frozen=True)
class Core:
    """What a streaming multiprocessor or compute unit holds."""

    registers: int  # of 32 bits, a lane of which one thread has
    warps: int
    shared_bytes: int
    programs: int
    register_step: int  # in which a thread's registers are given out
    reserved_bytes: int  # of shared memory, a program

    def holds(self, warps: int, warp_size: int, registers: int, shared_bytes: int) -> int:
        """Programs at a time."""
        a_thread = -(-registers // self.register_step) * self.register_step
        return min(
            self.registers // (a_thread * warp_size * warps),
            self.warps // warps,
            self.shared_bytes // (shared_bytes + self.reserved_bytes),
            self.programs,
        )


# CUDA C++ Programming Guide, table of technical specifications by compute capability; AMD's CDNA3 ISA guide.
CORES = {
    "sm_80": Core(65_536, 64, 164 << 10, 32, 8, 1024),
    "sm_90": Core(65_536, 64, 228 << 10, 32, 8, 1024),
    "sm_100": Core(65_536, 64, 228 << 10, 32, 8, 1024),
    "sm_120": Core(65_536, 48, 100 << 10, 24, 8, 1024),
    "gfx942": Core(4 * 512 * 64, 32, 64 << 10, 32, 8, 1),
}


def loose_barriers(ttir: str, amdgcn: str) -> int:
    """Barriers that the source asks for, less those in front of which `fence` waits for stores."""
    fences, waited = 0, False
    lines = [line.split(";", 1)[0].strip() if "#ASM" not in line else "#ASM" for line in amdgcn.splitlines()]
    codes = [line for line in lines if line and not line.startswith((".", "//"))]
    for before, code in pairwise(codes):
        if before == "#ASM" and code == "s_waitcnt vmcnt(0)":
            waited = True
        elif "store" in code:
            waited = False
        elif code == "s_barrier":
            fences += waited
            waited = False
    return len(re.findall(r"\b(?:ttg|gpu)\.barrier\b", ttir)) - fences


class CompileOnlyDriver:
    """The three questions Triton asks of a GPU before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend} {self.target.arch}"  # the key of Triton's in-memory cache of kernels

    def get_current_stream(self, _device: str) -> int:
        return 0


def gpu_target(name: str) -> GPUTarget:
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


def call_launcher(case: Case) -> None:
    if case.kernel in (*HEADS, *HALVES):
        call_head_launcher(case)
        return
    logits = torch.empty((ROWS, case.vocab), dtype=case.dtype)
    ids = torch.empty((ROWS, case.k), dtype=torch.int32)
    slots = torch.empty((ROWS, case.k))
    weights = torch.empty(ROWS)
    if case.kernel == "select_loss":
        kernels.select_loss(logits, logits, case.k, weights, 1.0)
    elif case.kernel in FAMILIES:
        kernels.support_loss(logits, ids, slots, weights, 1.0, FAMILIES[case.kernel])
    elif case.kernel == "tail_logit":
        kernels.tail_logit(logits, ids, 1.0)
    elif case.kernel == "mass_loss":
        kernels.mass_loss(logits, ids, slots, weights.double(), weights, 1.0, REVERSE_CODE, "tail")
    elif case.kernel == "mass_grad":
        kernels.mass_grad(slots, ids, torch.empty((ROWS, 2), dtype=torch.float64), weights, logits, 1.0, logits)
    elif case.kernel == "scatter":
        kernels.scatter(slots, ids, weights, logits, unique=True)
    elif case.kernel == "merge":
        merged(slots, ids)
    else:
        kernels.select(logits, case.k, normalize=case.kernel == "normalize")


def call_head_launcher(case: Case) -> None:
    n = 256  # so that the pairs fill a window
    hidden = torch.empty((n, case.width), dtype=case.dtype)
    head = torch.empty((case.vocab, case.width), dtype=case.dtype)
    ids = torch.zeros((n, case.k), dtype=torch.int32)
    slots = torch.ones((n, case.k))
    if case.kernel == "linear_loss":
        kernels.linear_loss(
            hidden, head, head[:, 0].contiguous(), ids, slots, slots[:, 0].contiguous(), 1.0, 1.0, 30.0, True
        )
    elif case.kernel == "linear_logits":
        kernels.linear_logits(hidden, head, head[:, 0].contiguous(), ids)
    elif case.kernel == "linear_hidden_grad":
        kernels.linear_hidden_grad(slots, ids, head)
    elif case.kernel == "scale_rows":
        kernels.scale_rows(hidden.float(), slots[:, 0].contiguous(), hidden)
    else:
        kernels.linear_weight_grad(slots, ids, hidden, head, None)


def compile_call(call: Callable[[], None], target: GPUTarget) -> list[tuple[Any, dict[str, Any]]]:
    """Compiles the kernels that `call` launches -> each compiled kernel and the keywords of its launch."""
    compiled = []
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, **launch: Any) -> None:
        compiled.append((run(kernel, *args, **{**launch, "warmup": True}), launch))

    driver.set_active(CompileOnlyDriver(target))
    hip = torch.version.hip or "compile only" if target.backend == "hip" else None
    with mock.patch.object(JITFunction, "run", compile_only), mock.patch.object(torch.version, "hip", hip):
        call()
    return compiled


def nvidia_tool(name: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(NVIDIA_TOOLS / name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def nvidia_cost(cubin: bytes) -> tuple[int, Sass]:
    """Registers and instructions, by the disassemblers that come with Triton."""
    usage = nvidia_tool("cuobjdump", "-res-usage", cubin=cubin)
    return int(re.search(r"\bREG:(\d+)", usage)[1]), Sass.parse(nvidia_tool("nvdisasm", "-c", "-hex", cubin=cubin))


def measure(case: Case, target_name: str, simulate: bool = True) -> Iterator[Cost]:
    target = gpu_target(target_name)
    kernels = compile_call(lambda: call_launcher(case), target)
    for kernel, launch in kernels:
        name = case.kernel if len(kernels) == 1 else kernel.metadata.name.removesuffix("_kernel")
        yield measure_kernel(case, name, kernel, launch, target, target_name, simulate)


def measure_kernel(
    case: Case, name: str, kernel: Any, launch: dict[str, Any], target: GPUTarget, target_name: str, simulate: bool
) -> Cost:
    scalars, loose, per_element, instructions, cycles = 0, 0, None, None, None
    loops: list[Loop] = []
    warps, shared = launch["num_warps"], kernel.metadata.shared
    if target.backend == "cuda":
        registers, sass = nvidia_cost(kernel.asm["cubin"])
        spills, instructions, loops = sass.spills, len(sass.codes), sass.loops(case.dtype.itemsize)
        if case.kernel in (*SELECTS, *HEADS):
            tile, threads = launch["BLOCK"] * launch.get("SLOTS", 1), warps * target.warp_size
            if case.kernel == "linear_weight_grad":  # one pair at a time, of which a compiled turn has several
                tile = max(tile, sass.scan_vectors * 16 // case.dtype.itemsize * threads)
            per_element = sass.scan_length * threads / tile
    else:
        counts = {name: int(n) for name, n in re.findall(r"\.(\w+_count):\s+(\d+)", kernel.asm["amdgcn"])}
        registers, spills, scalars = (counts[name] for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count"))
        loose = loose_barriers(kernel.asm["ttir"], kernel.asm["amdgcn"])
    programs = CORES[target_name].holds(warps, target.warp_size, registers, shared)
    if simulate and target_name in phases.TARGETS and name in phases.KERNELS:
        cycles = phases.measure(case, launch, sass, programs)
    return Cost(
        triton=triton.__version__,
        target=target_name,
        kernel=name,
        dtype=str(case.dtype).removeprefix("torch."),
        vocab=case.vocab,
        k=case.k,
        width=case.width,
        warps=warps,
        registers=registers,
        spills=spills,
        spilled_scalars=scalars,
        shared_bytes=shared,
        programs=programs,
        instructions=instructions,
        loops=loops,
        scan_per_element=per_element,
        loose_barriers=loose,
        cycles=cycles,
    )


def measure_all(cases: str, targets: list[str], simulate: bool) -> Iterator[Cost]:
    grids = [*CASES[cases], *CASES["small"], *CASES["few"]] if cases == "table" else CASES[cases]
    for target, case in product(targets, dict.fromkeys(case for grid in grids for case in product(*grid))):
        yield from measure(Case(*case), target, simulate)


def print_row(cost: Cost) -> None:
    per_element = "-" if cost.scan_per_element is None else f"{cost.scan_per_element:.1f}"
    print(
        f"{cost.target:<7} {cost.kernel:<16} {cost.dtype:<9} {cost.vocab:>7} {cost.k:>5} {cost.width:>5} "
        f"{cost.registers:>10} {cost.spills:>7} {cost.spilled_scalars:>8} {cost.shared_bytes:>7} {cost.programs:>8} "
        f"{per_element:>13}",
        flush=True,
    )


def write(costs: Iterable[dict[str, Any]], file: Path) -> None:
    """A line each, so that what changed shows in a diff."""
    lines = ",\n".join(map(json.dumps, costs))
    file.write_text(f"[\n{lines}\n]\n")


def kept(file: Path, targets: Iterable[str]) -> list[dict[str, Any]]:
    """The records of other targets in a file that may not be there yet."""
    records = json.loads(file.read_text()) if file.exists() else []
    return [record for record in records if record["target"] not in targets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), help="sm_NN or gfxNNN (default: %(default)s)")
    parser.add_argument("--cases", choices=list(CASES), default="small")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the records here")
    parser.add_argument("--no-cycles", action="store_true", help="without the simulation, which takes half of the time")
    args = parser.parse_args()
    if INTERPRETED.value:
        sys.exit("TRITON_INTERPRET is set, so the kernels were built for the interpreter: unset it to compile them.")
    print(f"Triton {triton.__version__}; instr/element: SASS instructions per element of the scan loop")
    head = "target  kernel           dtype       vocab     K     H  registers  spills (scalar)  shared programs"
    print(f"{head} instr/element")
    costs = []
    for cost in measure_all(args.cases, args.targets, simulate=not args.no_cycles):
        print_row(cost)
        costs.append(cost)
    if args.json:
        records = [*kept(args.json, args.targets), *map(asdict, costs)]
        order = {target: i for i, target in enumerate(TARGETS)}
        write(sorted(records, key=lambda record: order.get(record["target"], len(order))), args.json)


if __name__ == "__main__":
    main()
