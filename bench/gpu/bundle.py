"""`python -m bench.gpu.bundle`: what a machine with GPUs and no network needs, in parts that are small enough to carry.

    build/gpu-bundle/install.sh        installs from the parts beside it, offline
    build/gpu-bundle/part-1/ …         wheels, exported models, requirements.txt, SHA256SUMS

Wheels are those of this project's pins for the Python there; what is installed there already stays. Files that
are larger than a part are cut into pieces, which the script joins. A part that is missing is missed by name.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.gpu.supervise import ROOT
from engines.errors import BundleError, EngineError
from engines.manifest import MANIFEST
from engines.store import BUILD

FOLDER = ROOT / "build" / "gpu-bundle"
PART_BYTES = 40 << 20  # a part and the checkout beside it are to stay under 64 MiB
PIP = "pip==26.0"
GLIBC = (39, 35, 34, 31, 28, 27, 24, 17)  # of manylinux tags; pip matches each exactly
MODELS = ("shapes", "shapes-fp16")
# cuda-python holds nothing but a pin of the bindings, which would replace those that PyTorch brought
SKIPPED = ("cuda-python",)
BINDINGS = "cuda-bindings"


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.bundle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default="3.12", help="version of Python there; 3.12")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--without-rtx", action="store_true", help="leave TensorRT-RTX out, which is 95 MB")
    parser.add_argument("--onnxruntime-gpu", action="store_true", help="ONNX Runtime for CUDA, too: 256 MB more")
    return parser


def requirements() -> dict[str, list[str]]:
    """The pins of this project by what they are for; the bindings are those that cuda-python's version pins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pins = [*project["dependencies"], *extras["cuda"], *extras["cpu"]]
    version = next(pin.partition("==")[2] for pin in pins if pin.startswith("cuda-python=="))
    core = [pin for pin in pins if pin.partition("==")[0] not in SKIPPED]
    rtx = extras["rtx"][0].partition("==")[2]
    return {
        "core": [*core, f"{BINDINGS}=={version}"],
        "rtx": [f"tensorrt_rtx_cu13_bindings=={rtx}", f"tensorrt_rtx_cu13_libs=={rtx}"],
        "rtx sources": [f"tensorrt-rtx=={rtx}", f"tensorrt_rtx_cu13=={rtx}"],
        "gpu": [extras["gpu"][0].replace("[cuda,cudnn]", "")],
    }


def platform_options(python: str) -> list[str]:
    """What tells pip to fetch for another Python on x86-64 Linux."""
    options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    options += ["--abi", f"cp{python.replace('.', '')}", "--abi", "abi3", "--abi", "none"]
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    return options + [option for one in platforms for option in ("--platform", one)]


def pip(*command: str) -> None:
    """Runs pip; BundleError with its last words."""
    full = [sys.executable, "-m", "pip", "--disable-pip-version-check", *command]
    done = subprocess.run(full, capture_output=True, text=True)
    if done.returncode:
        raise BundleError(f"pip {command[0]} failed: {done.stderr.strip().splitlines()[-1:]}")


def fetch(python: str, target: Path, *, rtx: bool, onnxruntime_gpu: bool) -> None:
    """All wheels. TensorRT-RTX's front ends come as sources without native code, and are built here."""
    wanted, common = requirements(), ["--quiet", "--dest", str(target), *platform_options(python)]
    pip("download", *common, *wanted["core"], PIP)
    if rtx:
        pip("download", "--no-deps", *common, *wanted["rtx"])
        pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(target), *wanted["rtx sources"])
    if onnxruntime_gpu:
        pip("download", "--no-deps", *common, *wanted["gpu"])


def pack_models(models: Sequence[str], target: Path) -> None:
    """Exported models without plans, which belong to one kind of machine."""
    for model in models:
        folder = BUILD / model
        if not (folder / MANIFEST).is_file():
            raise BundleError(f"there is no exported model in {folder}: run `make gpu-bundle`, which exports it")
        with tarfile.open(target / f"{model}.tar.gz", "w:gz") as archive:
            for path in sorted(path for path in folder.iterdir() if path.is_file()):
                archive.add(path, f"{model}/{path.name}")


def pieces(path: Path, size: int) -> list[Path]:
    """The file itself, or where it is too large for a part its pieces in its place."""
    if path.stat().st_size <= size:
        return [path]
    found: list[Path] = []
    with path.open("rb") as file:
        while content := file.read(size):
            found.append(path.with_name(f"{path.name}.piece-{len(found):02}"))
            found[-1].write_bytes(content)
    path.unlink()
    return found


def divide(files: Iterable[Path], folder: Path, size: int) -> int:
    """Moves files into as few parts as it takes in their order; how many there are."""
    part, room = 0, 0
    for path in files:
        bytes_ = path.stat().st_size
        if bytes_ > room:
            part, room = part + 1, size
            (folder / f"part-{part}").mkdir()
        shutil.move(path, folder / f"part-{part}" / path.name)
        room -= bytes_
    return part


def make(
    python: str, folder: Path, *, rtx: bool = True, onnxruntime_gpu: bool = False, size: int = PART_BYTES,
    models: Sequence[str] = MODELS,
) -> int:  # fmt: skip
    """Makes the folder anew, and says how many parts it has. First comes what every check needs."""
    with tempfile.TemporaryDirectory(dir=_parent(folder)) as scratch:
        work = Path(scratch)
        fetch(python, work, rtx=rtx, onnxruntime_gpu=onnxruntime_gpu)
        pack_models(models, work)
        whole = sorted(work.iterdir(), key=lambda path: (_later(path), path.name))
        sums = [f"{_sha256(path)}  {path.name}" for path in whole]
        (work / "SHA256SUMS").write_text("\n".join(sums) + "\n")
        (work / "requirements.txt").write_text("\n".join(names(requirements()["core"])) + "\n")
        (work / "python").write_text(f"{python}\n")
        first = [work / name for name in ("requirements.txt", "SHA256SUMS", "python")]
        files = [*first, *(piece for path in whole for piece in pieces(path, size))]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        count = divide(files, folder, size)
        shutil.copy(Path(__file__).with_name("install.sh"), folder / "install.sh")
    return count


def names(pins: Sequence[str]) -> list[str]:
    """Requirements that any version meets: what is installed there stays. Only the bindings must be of CUDA 13."""
    return [f"{BINDINGS}>=13" if pin.startswith(BINDINGS) else pin.partition("==")[0] for pin in pins]


def _later(path: Path) -> int:
    """In which order parts are filled: exported models behind wheels, and last what PyTorch brings or is optional."""
    order = ("shapes", "numpy", "onnxruntime-", "nvidia_cuda_nvrtc", "tensorrt_rtx", "onnxruntime_gpu")
    return next((n + 1 for n, name in enumerate(order) if path.name.startswith(name)), 0)


def _parent(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.parent


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> int:
    """Exit code 1 with one message on any error."""
    options = arguments().parse_args()
    try:
        count = make(
            options.python, options.folder, rtx=not options.without_rtx, onnxruntime_gpu=options.onnxruntime_gpu
        )
    except (EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    for number in range(1, count + 1):
        files = list((options.folder / f"part-{number}").iterdir())
        size = sum(path.stat().st_size for path in files)
        print(f"{options.folder / f'part-{number}'}: {len(files)} files, {size / (1 << 20):.1f} MiB")  # noqa: T201
    print(f"there: bash {options.folder.name}/install.sh in the checkout's build folder, then make gpu-check")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
