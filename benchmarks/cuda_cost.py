"""What the CUDA kernels cost once compiled by nvcc, for any NVIDIA target and without a GPU.

    python -m benchmarks.cuda_cost [--targets sm_80 sm_90a] [--json benchmarks/results/cuda_cost.json]

One compilation serves every V, K and H, so there is one record a kernel, dtype and target. Shared memory is asked for
at launch; what is counted here is what a kernel has before. The instructions an element are those of the loop that
reads the row, less the loops inside it, which only candidates run.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.compiled_cost import NVIDIA_TOOLS, write
from benchmarks.sass import Sass, load_bits

SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
TARGETS = ("sm_80", "sm_90a", "sm_100", "sm_120")
FILES = ("select", "support_loss", "scatter", "linear_loss", "linear_weight_grad")
DTYPES = {"13__nv_bfloat16": "bfloat16", "6__half": "float16", "f": "float32"}
PACKS = 4  # of 16 bytes that a thread takes in one turn of the loop, as in select.cu; so many elements:
ELEMENTS = {"select_kernel": {"bfloat16": 32, "float16": 32, "float32": 16}}


@dataclass(frozen=True)
class Cost:
    """What one compiled kernel uses; a spill is an instruction that goes to memory for lack of a register."""

    nvcc: str
    target: str
    kernel: str
    dtype: str
    variant: str
    registers: int
    spills: int
    stack_bytes: int
    shared_bytes: int
    load_bits: int  # the widest load from global memory
    scan_per_element: float | None


def tool(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernels(target: str, source: Path, build: Path | None) -> Iterator[tuple[str, dict[str, int], Sass]]:
    """The mangled name of each kernel of a source, its resources, and its instructions."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(compiled(target, source, build, Path(folder)))
        usage = tool(str(NVIDIA_TOOLS / "cuobjdump"), "-res-usage", cubin)
        sections = re.split(r"^\.text\.(\S+):\s*$", tool(str(NVIDIA_TOOLS / "nvdisasm"), "-c", cubin), flags=re.M)
    code = dict(zip(sections[1::2], sections[2::2], strict=True))
    for name, resources in re.findall(r"Function (\S+):\s*\n(.*)", usage):
        yield name, {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", resources)}, Sass.parse(code[name])


def compiled(target: str, source: Path, build: Path | None, folder: Path) -> Path:
    """Into a folder: anew, or out of the objects of a CMake build for that target alone."""
    if build is None:
        tool("nvcc", "-cubin", f"-arch={target}", str(source), "-o", str(folder / "kernel.cubin"))
    else:
        (built,) = build.rglob(f"{source.name}.o")
        subprocess.run([NVIDIA_TOOLS / "cuobjdump", "-xelf", "all", built], cwd=folder, capture_output=True, check=True)
    (cubin,) = folder.glob("*.cubin")
    return cubin


def straight_length(sass: Sass) -> int:
    """Of the shortest loop that loads all packs of a turn and meets a barrier, less the loops inside it.

    Not of the longest: what seldom runs is laid out after everything else and jumps back over it.
    """

    def scans(loop: range) -> bool:
        names = sass.names[loop.start : loop.stop]
        return names.count("LDG") >= PACKS and "BAR" in names

    scan = min(filter(scans, sass.ranges), key=len)
    inside = [loop for loop in sass.ranges if loop != scan and loop.start >= scan.start and loop.stop <= scan.stop]
    return len(set(scan).difference(*inside))


def measure(target: str, files: Iterable[str] = FILES, build: Path | None = None) -> Iterator[Cost]:
    nvcc = re.search(r"release ([\d.]+)", tool("nvcc", "--version"))[1]
    for file in files:
        for mangled, used, sass in kernels(target, SOURCES / f"{file}.cu", build):
            kernel, arguments = re.search(r"\d+([a-z_]+_kernel)(?:I(.+?)EE)?", mangled).groups()
            dtype = next((name for key, name in DTYPES.items() if (arguments or "").startswith(key)), "any")
            switches = re.findall(r"Lb([01])", arguments or "")  # of select_kernel alone
            variant = " ".join(name for name, on in zip(("packed", "normalize"), switches, strict=False) if on == "1")
            elements = ELEMENTS.get(kernel, {}).get(dtype)
            yield Cost(
                nvcc=nvcc,
                target=target,
                kernel=kernel,
                dtype=dtype,
                variant=variant,
                registers=used["REG"],
                spills=sass.spills,
                stack_bytes=used["STACK"],
                shared_bytes=used["SHARED"],
                load_bits=max(map(load_bits, sass.codes)),
                scan_per_element=elements and straight_length(sass) / elements,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the records here")
    args = parser.parse_args()
    costs = []
    for target in args.targets:
        for cost in measure(target):
            scan = "-" if cost.scan_per_element is None else f"{cost.scan_per_element:.1f}"
            name = f"{cost.kernel} {cost.variant}"
            print(f"{target:<7} {name:<34} {cost.dtype:<9} {cost.registers:>4} regs {cost.spills:>3} spills {scan:>5}")
            costs.append(cost)
    if args.json:
        write(map(asdict, costs), args.json)


if __name__ == "__main__":
    main()
