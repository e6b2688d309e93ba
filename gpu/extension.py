"""Builds topk_rkl._cuda alone, for a Python and a GPU that need not be here, and puts what was built in its place.

python -m gpu.extension --python python3.12 --architecture 90a-real

What is built stays in build/gpu-extension, with a note of what it was built from. A GPU machine then has nothing to
compile: its Python takes the file if the sources are still the same.
"""

import argparse
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu import card
from gpu.commit import commit

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "gpu-extension"
NAME = "_cuda" + importlib.machinery.EXTENSION_SUFFIXES[0]  # of the Python that runs this
NOTE = "built.json"
LOADS = "from topk_rkl import _cuda; print(_cuda.BUILD)"


def sources(root: Path = ROOT) -> str:
    """A digest of what the extension is built from."""
    digest = hashlib.sha256()
    for file in [root / "CMakeLists.txt", *sorted((root / "csrc").rglob("*"))]:
        if file.is_file():
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def build(python: str, architecture: str, folder: Path = FOLDER) -> None:
    """For that Python, whose headers are needed; pybind11, CMake and ninja are those of the Python that runs this."""
    import pybind11

    cmake = [sys.executable, "-m", "cmake"] if importlib.util.find_spec("cmake") else ["cmake"]
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work:
        options = [
            "-DTOPK_RKL_CUDA=device",
            f"-DCMAKE_CUDA_ARCHITECTURES={architecture}",
            f"-DPython_EXECUTABLE={shutil.which(python) or python}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if importlib.util.find_spec("ninja"):
            import ninja

            options += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja.BIN_DIR}/ninja"]
        jobs = str(os.cpu_count())
        subprocess.run([*cmake, "-S", ROOT, "-B", work, *options], check=True)
        subprocess.run([*cmake, "--build", work, "--target", "_cuda", "--parallel", jobs], check=True)
        subprocess.run([*cmake, "--install", work, "--component", "_cuda", "--prefix", folder], check=True)
    note = {"architecture": architecture, "commit": commit(ROOT), "sources": sources()}
    (folder / NOTE).write_text(json.dumps(note) + "\n")


def refusal(folder: Path = FOLDER) -> str | None:
    """Why what is in the folder is not to be used here, or None."""
    if not (folder / NAME).exists():
        there = [file.name for file in folder.glob("_cuda*")]
        return f"{folder} has {', '.join(there) or 'nothing'}; this Python needs {NAME}"
    note = json.loads((folder / NOTE).read_text())
    if note["sources"] != sources():
        return f"{folder / NAME} was built from other sources"
    if card.capability() and note["architecture"] != architecture():
        return f"{folder / NAME} was built for {note['architecture']}; the card here needs {architecture()}"
    return None


def is_taken() -> bool:
    return (ROOT / "topk_rkl" / NAME).exists()


def loads() -> bool:
    """Whether the package's _cuda loads in a new process."""
    return subprocess.run([sys.executable, "-c", LOADS], cwd=ROOT, check=False).returncode == 0


def take(folder: Path = FOLDER) -> bool:
    """Puts what was built beside the package's Python, unless it is no use there."""
    place = ROOT / "topk_rkl" / NAME
    place.unlink(missing_ok=True)  # one of other sources must not stay
    if reason := refusal(folder):
        print(reason, flush=True)
        return False
    shutil.copy(folder / NAME, place)
    if not loads():
        place.unlink()
        return False
    return True


def architecture() -> str:
    """CMake's name for the card that is here."""
    capability = card.capability()
    if capability is None:
        raise SystemExit("nvidia-smi names no GPU; give --architecture, such as 90a-real")
    return {"9.0": "90a-real"}.get(capability, capability.replace(".", "") + "-real")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu.extension", description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="the Python that will import it")
    parser.add_argument("--architecture", help="as CMake names it, such as 90a-real; else that of the card here")
    parser.add_argument("--take", action="store_true", help="put it into the package; build only if that fails")
    options = parser.parse_args()
    if options.take and take():
        return 0
    build(options.python, options.architecture or architecture())
    return 0 if not options.take or take() else 1


if __name__ == "__main__":
    sys.exit(main())
