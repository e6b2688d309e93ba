"""What runs on a GPU: the steps of both plans in the order of their worth, and the test files that go there."""

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

from gpu import extension
from gpu.steps import Step

# Ordered so that what takes longest begins first.
TESTED = (
    "gpu", "ops", "loss", "gradients", "linear", "select", "select_keys", "linear_loss", "linear_logits", "cuda",
    "divergence", "mass", "supports", "temperature", "composition", "properties", "weighting", "causal", "diagnostics",
    "backends", "slabs", "outputs", "triton", "compute_sanitizer",
)  # fmt: skip
# What these show is shown without a GPU.
UNTESTED = {
    "benchmarks": "the registry and the report of the benchmarks, on CPU tensors",
    "checks": "refusals before any launch, on CPU tensors",
    "cli": "the command line, on CPU tensors",
    "cli_env": "a report of this machine, not of kernels",
    "cli_smollm2": "a model of transformers, on CPU tensors",
    "compile": "tracing, which is the same on a CPU",
    "compiled_cost": "ptxas counts registers without a GPU",
    "cuda_launch": "launches on stand-ins for the CUDA run time",
    "cuda_on_host": "the CUDA sources compiled for the host",
    "distill": "the demo, on CPU tensors",
    "docs": "the pages, on CPU tensors",
    "dtensors": "gloo ranks, on CPU tensors",
    "extraction": "models of transformers, on CPU tensors",
    "gpu_checks": "the rehearsal of the smoke test",
    "gpu_items": "the timed items, in the interpreter",
    "gpu_kit": "the rehearsal of the steps",
    "gpu_plan": "the plans, and how results are told",
    "gpu_results": "how results are collected and reported",
    "head_loss": "models of transformers, on CPU tensors",
    "integration_pages": "the pages of trainers that need GPUs, on stand-ins and CPU tensors",
    "interpreter": "Triton's interpreter",
    "memory": "the resident memory of a process; test_gpu.py reads that of a GPU",
    "native": "the extension of CPUs",
    "native_sanitized": "the extension of CPUs",
    "objectives": "formulas in float64 on CPU tensors",
    "parallel": "gloo ranks, on CPU tensors",
    "parallel_defects": "gloo ranks, on CPU tensors",
    "parallel_edges": "gloo ranks, on CPU tensors",
    "parallel_example": "gloo ranks, on CPU tensors",
    "parallel_page": "the blocks of docs/parallel.md on gloo ranks, of CPU tensors",
    "paper": "the frame of the studies, on CPU tensors",
    "paper_control": "a study of two CPU cores",
    "paper_failures": "a study of two CPU cores",
    "paper_mass": "a study of two CPU cores",
    "paper_method": "a study of two CPU cores",
    "paper_smollm2": "a study of two CPU cores",
    "paper_variance": "a study of two CPU cores",
    "patch": "trainers of transformers, on CPU tensors",
    "plot": "pictures of CPU tensors",
    "predict": "the model of a card, by hand",
    "out_of_bounds": "Triton's interpreter under AddressSanitizer",
    "ranks": "gloo ranks, on CPU tensors",
    "readme": "the README's blocks on CPU tensors",
    "reference": "the reference in float64 on CPU tensors",
    "rewards": "plain PyTorch on CPU tensors",
    "rollout": "plain PyTorch on CPU tensors",
    "scaling": "the model of ranks, by hand and beside gloo on CPU tensors",
    "sequence_parallel": "sums over gloo ranks, of CPU tensors",
    "server_client": "clients and stand-ins of servers, on CPU tensors",
    "servers": "answers of servers, on CPU tensors",
    "servers_others": "answers of servers, on CPU tensors",
    "servers_recorded": "answers of servers beside a model on the CPU",
    "servers_strings": "answers of servers, on CPU tensors",
    "servers_vllm": "answers of servers, on CPU tensors",
    "sharded_heads": "gloo ranks, on CPU tensors",
    "sharded_training": "gloo ranks, on CPU tensors",
    "simulate": "the model of compiled code, by hand",
    "store": "files on a disk, of CPU tensors",
    "store_killed": "files on a disk, of CPU tensors",
    "store_readers": "files on a disk, of CPU tensors",
    "store_training": "files on a disk, and tiny models on CPU tensors",
    "sums": "the order of sums, in what Triton compiles without a GPU",
    "tokenizers": "tokens and their ids, on CPU tensors",
    "transformers_trainer": "the Trainer of transformers, on CPU tensors",
    "triton_launch": "launches on a stand-in for the driver",
    "support": "indices and joins, on CPU tensors",
    "trl": "the trainers of TRL on CPU tensors",
    "trl_losses": "losses beside TRL's own, on CPU tensors",
    "typing": "what a type checker sees",
    "used_in": "the table of what ran in trainers",
    "wheel": "builds and installs",
}
# Of the files that are tested, what shows nothing of a GPU and takes seconds.
UNTESTED_THERE = {
    "backends.py::test_a_triton_that_is_too_old_is_told_by_its_version": "a stand-in for another Triton",
    "backends.py::test_the_environment_variable_sets_the_backend": "CPU tensors, on the reference",
    "backends.py::test_the_package_imports_and_works_without_triton": "CPU tensors, on the reference",
    "backends.py::test_the_package_works_where_the_extension_was_not_built": "CPU tensors, on the reference",
    "backends.py::test_the_slow_path_on_a_cpu_is_told_once_where_it_is_taken": "CPU tensors, on the reference",
    "backends.py::test_triton_refuses_cpu_tensors_unless_interpreted": "CPU tensors, in the interpreter",
    "causal.py::test_ranks_refuse_together": "gloo ranks, on CPU tensors",
    "compute_sanitizer.py::test_the_kernels_without_a_fault": "a step of its own",
    "linear.py::test_the_dense_product_is_not_taken_where_it_has_fewer_bits": "settings of a CPU's products",
    "supports.py::test_a_saved_support_loads_with_weights_only": "what torch.load takes",
}
CASES = ("tiny", "select", "loss", "small N", "loss on ids", "linear", "sparse head", "scaling")  # of the GPU suite
# Of these, with the seconds in which other projects are compiled, held to float64 and timed.
BESIDE_OTHERS = {"linear": 170, "loss on ids": 60, "loss": 60}
BESIDE = "smoke triton"  # runs while the extension is built
NEED_EXTENSION = ("smoke cuda", "sanitizer")
NEED_CARD = ("suite", "sanitizer", "ncu")  # not in a rehearsal
WORKERS = min(16, os.cpu_count() or 1)
PATIENCE = 50  # times the limits, in a rehearsal on a machine that may be busy
KERNELS = "regex:select_kernel|linear_loss_kernel|scatter_kernel"
SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis", "LaunchStats")


def environment(root: Path, commit: str, small: bool) -> dict[str, str]:
    """Of every step."""
    path = [str(root), str(root / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "COMMIT": commit,
        "TRITON_CACHE_DIR": str(root / "build" / "triton"),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # or every product warns under deterministic algorithms
        **({"TRITON_INTERPRET": "1"} if small else {}),
    }


def python(*words: object) -> tuple[str, ...]:
    return (sys.executable, *map(str, words))


def made() -> Step:
    """Taken if it was built before, else built, which 16 cores do in half a minute."""
    return Step("extension", 150, python("-m", "gpu.extension", "--take"))


def card(out: Path, small: bool) -> Step:
    probe = python("-m", "gpu.card", out / "steps.jsonl")
    return Step("card", 40 * PATIENCE, (*probe, "--small")) if small else Step("card", 40, probe)


def steps(plan: str, out: Path, small: bool) -> list[Step]:
    little = ("--small",) if small else ()
    groups = ("--limit", 45 * PATIENCE, "--group", "scatter", "--group", "mass") if small else ()
    smoke = python("-m", "gpu.smoke", "--out", out / "smoke.jsonl", *little, *groups)
    items = python("-m", "gpu.items", "--out", out / "items.jsonl", "--skip-done", *little)
    first = [
        Step("smoke triton", 75, (*smoke, "triton")),
        Step("smoke cuda", 60, (*smoke, "cuda")),
        Step("items", 90, items, tries=4),  # a fault ends its process; the items after it are still wanted
        Step("tests", 230, tests(out, small), "tests.txt"),
        Step("sanitizer", 80, python("-m", "gpu.sanitizer"), "sanitizer.txt"),
        Step("ncu", 60, ncu(), "ncu.txt"),
    ]
    if small:
        there = extension.is_taken()
        kept = [step for step in first if step.kind not in NEED_CARD and (there or step.name not in NEED_EXTENSION)]
        return [replace(step, limit=PATIENCE * step.limit) for step in kept]
    if plan == "first":
        return first
    if plan == "beside":
        return [Step(f"suite {name}", limit, case(name, out)) for name, limit in BESIDE_OTHERS.items()]
    suite = {name: Step(f"suite {name}", 60, case(name, out, "--only-ours")) for name in CASES}
    scaling = replace(suite.pop("scaling"), limit=150)  # 35 cases
    return [*suite.values(), first[-1], *(step for step in first if step.kind == "tests"), scaling]


def tests(out: Path, small: bool) -> tuple[str, ...]:
    files = ["tests/test_select.py", "-k", "test_zeros"] if small else [f"tests/test_{x}.py" for x in TESTED]
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "--strict-markers"]
    options += ["-q", "-rfE", "--tb=short", "--durations=25"]
    options += [word for name in UNTESTED_THERE for word in ("--deselect", f"tests/test_{name}")]
    if importlib.util.find_spec("xdist") and not small:
        options += ["-n", str(WORKERS), "--dist", "loadgroup"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", "90", "--timeout-method", "thread"]  # a signal does not reach a wait for the GPU
        options += ["-o", "faulthandler_timeout=80"]  # tells where: what pytest-timeout says is lost under pytest-xdist
    # Workers of as many threads as cores wait for one another: a test of 1 s took 19 s.
    alone = ("env", "OMP_NUM_THREADS=1", "TORCHINDUCTOR_COMPILE_THREADS=1")
    return (*alone, *python("-m", "pytest", *options, "-p", "gpu.stream", "--stream", out / "tests.jsonl", *files))


def case(name: str, out: Path, *options: str) -> tuple[str, ...]:
    """Few rounds: other projects and torch.compile take seconds to begin."""
    few = ("--seconds", 0.5, "--rounds", 9, "--out", out / "suite.jsonl")
    return python("-m", "benchmarks", "run", "--suite", "gpu", "--case", name, *options, *few)


def ncu() -> tuple[str, ...]:
    sections = [word for name in SECTIONS for word in ("--section", name)]
    options = ("--clock-control", "none", *sections, "--kernel-name", KERNELS, "--launch-count", "7")
    return ("ncu", *options, *python("-m", "gpu.items", "--ncu"))
