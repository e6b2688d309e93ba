"""What the Triton kernels cost once compiled, for any target and without a GPU.

    python -m benchmarks.compiled_cost [--targets sm_90 gfx942] [--cases few|small|full] [--json FILE]

The launchers are called on CPU tensors under a driver that compiles and never launches, so every block size, option
and argument specialisation is the one a real call gets.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from topk_rkl.backends.triton import (
    scatter,
    select,
    select_loss,
    sparse_head,
    sparse_head_weight_grad,
    support_loss,
)
from topk_rkl.backends.triton.launch import INTERPRETED

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ROWS = 2

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SELECTS = ("select", "normalize", "select_loss")
SLOTS = ("support_loss", "scatter", "scatter_repeated")
HEADS = ("sparse_head", "sparse_head_weight_grad")
# Each line is a product: kernels, dtypes, vocabularies, K, and H where there are hidden states. Rows of 4099 and 50257
# may start at any address.
CASES = {
    "few": [
        (("select_loss", *SLOTS), (BF16,), (151936,), (64,)),
        (("normalize",), (FP32,), (151936,), (1024,)),
        (HEADS, (BF16,), (151936,), (64,), (4096,)),
        (HEADS, (FP32,), (151936,), (1024,), (4096,)),
    ],
    "small": [
        (("select_loss",), (BF16, FP32), (151936,), (1, 64, 256, 1024)),
        (("normalize",), (BF16, FP32), (151936,), (64, 1024)),
        (("select", "select_loss"), (FP16,), (32000,), (64,)),
        (("normalize", "select_loss"), (BF16,), (50257,), (64,)),
        (("select_loss",), (FP32,), (4099,), (1024,)),
        (SLOTS, (BF16,), (151936,), (64, 1024)),
        (HEADS, (BF16,), (151936,), (64,), (4096,)),
        (HEADS, (FP32,), (151936,), (1024,), (4096,)),
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
    that does not fit goes to a lane of a vector register instead, which costs an instruction and no memory.
    """

    triton: str
    target: str
    kernel: str
    dtype: str
    vocab: int
    k: int
    width: int
    registers: int
    spills: int
    spilled_scalars: int
    shared_bytes: int
    scan_per_element: float | None


@dataclass(frozen=True)
class Sass:
    """A disassembled kernel: the name of each instruction, and each loop as a range of instructions."""

    names: list[str]
    loops: list[range]

    @classmethod
    def parse(cls, text: str) -> "Sass":
        names, loops, labels = [], [], {}
        for line in text.splitlines():
            if label := re.match(r"\s*(\.L_\w+):", line):
                labels[label[1]] = len(names)
            elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?(\w+)(.*);", line):
                names.append(instruction[1])
                branch = re.search(r"`\((\.L_\w+)\)", instruction[2])
                if instruction[1] == "BRA" and branch and branch[1] in labels:
                    loops.append(range(labels[branch[1]], len(names)))
        return cls(names, loops)

    @property
    def spills(self) -> int:
        return sum(name in ("STL", "LDL") for name in self.names)

    @property
    def scan_length(self) -> int | None:
        """Instructions in the first loop that reads global memory."""
        return next((len(loop) for loop in self.loops if "LDG" in self.names[loop.start : loop.stop]), None)


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
    if case.kernel in HEADS:
        call_head_launcher(case)
        return
    logits = torch.empty((ROWS, case.vocab), dtype=case.dtype)
    ids = torch.empty((ROWS, case.k), dtype=torch.int32)
    slots = torch.empty((ROWS, case.k))
    weights = torch.empty(ROWS)
    if case.kernel == "select_loss":
        select_loss(logits, logits, case.k, weights, 1.0)
    elif case.kernel == "support_loss":
        support_loss(logits, ids, slots, weights, 1.0)
    elif case.kernel in SLOTS:
        scatter(slots, ids, weights, logits, unique=case.kernel == "scatter")
    else:
        select(logits, case.k, normalize=case.kernel == "normalize")


def call_head_launcher(case: Case) -> None:
    n = 256  # so that the pairs fill a window
    hidden = torch.empty((n, case.width), dtype=case.dtype)
    head = torch.empty((case.vocab, case.width), dtype=case.dtype)
    ids = torch.zeros((n, case.k), dtype=torch.int32)
    slots = torch.ones((n, case.k))
    if case.kernel == "sparse_head":
        sparse_head(hidden, head, head[:, 0].contiguous(), ids, slots, slots[:, 0].contiguous(), 1.0, 1.0, 30.0, True)
    else:
        sparse_head_weight_grad(slots, ids, hidden, head, None)


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


def nvidia_tool(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(NVIDIA_TOOLS / name), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def nvidia_cost(cubin: bytes) -> tuple[int, Sass]:
    """Registers and instructions, by the disassemblers that come with Triton."""
    usage = nvidia_tool("cuobjdump", "-res-usage", cubin)
    return int(re.search(r"\bREG:(\d+)", usage)[1]), Sass.parse(nvidia_tool("nvdisasm", "-c", cubin))


def measure(case: Case, target_name: str) -> Iterator[Cost]:
    target = gpu_target(target_name)
    kernels = compile_call(lambda: call_launcher(case), target)
    for kernel, launch in kernels:
        name = case.kernel if len(kernels) == 1 else kernel.metadata.name.removesuffix("_kernel")
        yield measure_kernel(case, name, kernel, launch, target, target_name)


def measure_kernel(
    case: Case, name: str, kernel: Any, launch: dict[str, Any], target: GPUTarget, target_name: str
) -> Cost:
    scalars, per_element = 0, None
    if target.backend == "cuda":
        registers, sass = nvidia_cost(kernel.asm["cubin"])
        spills = sass.spills
        if case.kernel in (*SELECTS, *HEADS):
            tile = launch["BLOCK"] * launch.get("SLOTS", launch.get("PAIRS", 1))
            per_element = sass.scan_length * launch["num_warps"] * target.warp_size / tile
    else:
        counts = {name: int(n) for name, n in re.findall(r"\.(\w+_count):\s+(\d+)", kernel.asm["amdgcn"])}
        registers, spills, scalars = (counts[name] for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count"))
    dtype = str(case.dtype).removeprefix("torch.")
    return Cost(
        triton=triton.__version__,
        target=target_name,
        kernel=name,
        dtype=dtype,
        vocab=case.vocab,
        k=case.k,
        width=case.width,
        registers=registers,
        spills=spills,
        spilled_scalars=scalars,
        shared_bytes=kernel.metadata.shared,
        scan_per_element=per_element,
    )


def measure_all(cases: str, targets: list[str]) -> Iterator[Cost]:
    for target, grid in product(targets, CASES[cases]):
        for case in product(*grid):
            yield from measure(Case(*case), target)


def print_row(cost: Cost) -> None:
    per_element = "-" if cost.scan_per_element is None else f"{cost.scan_per_element:.1f}"
    print(
        f"{cost.target:<7} {cost.kernel:<16} {cost.dtype:<9} {cost.vocab:>7} {cost.k:>5} {cost.width:>5} "
        f"{cost.registers:>10} {cost.spills:>7} {cost.spilled_scalars:>8} {cost.shared_bytes:>7} {per_element:>13}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), help="sm_NN or gfxNNN (default: %(default)s)")
    parser.add_argument("--cases", choices=list(CASES), default="small")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the records here")
    args = parser.parse_args()
    if INTERPRETED.value:
        sys.exit("TRITON_INTERPRET is set, so the kernels were built for the interpreter: unset it to compile them.")
    print(f"Triton {triton.__version__}; instr/element: SASS instructions an element of the scan loop")
    print("target  kernel           dtype       vocab     K     H  registers  spills (scalar)  shared instr/element")
    costs = []
    for cost in measure_all(args.cases, args.targets):
        print_row(cost)
        costs.append(cost)
    if args.json:
        args.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=1) + "\n")


if __name__ == "__main__":
    main()
