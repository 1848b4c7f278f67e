"""The rules of the house: which way imports point, where foreign libraries live, how long things get, where tests lie.

Two comments grant exceptions, each with its reason. Both fail here as soon as they are not needed any more:

- `# long: REASON` above a function of more than 60 lines, or before the first statement of a file of more than 450;
- `# covers: PATH, PATH` in a test module that is not named after one source file or folder.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from tests import ROOT

PACKAGES = ("bench", "engines", "export", "runtime")
ALLOWED = {
    "engines": {"engines"},
    # schedulers are pure; with them an export refuses before the work what the runtime would refuse after it
    "export": {
        "engines.command",
        "engines.errors",
        "engines.devices",
        "engines.manifest",
        "engines.memory",
        "engines.store",
        "export",
        "runtime.sampling.schedulers",
    },
    "runtime": {"engines", "runtime"},
    # the embedded model's images are a specification that benchmarks ask for, not a part of exporting
    "bench": {"bench", "engines", "runtime", "export.shapes.data"},
    # samplers are pure: arithmetic over slots, and a backend to run it on
    "runtime/sampling": {
        "engines.base",
        "engines.errors",
        "engines.host",
        "engines.manifest",
        "runtime.sampling",
    },
}
TORCH = ("torch", "diffusers", "transformers", "onnx", "matplotlib")
WEB = ("fastapi", "starlette", "uvicorn")
PROTOCOLS = ("runtime/serve/openai", "runtime/serve/kserve", "runtime/serve/ray")
# library → the files and folders that may import it at all
ROOMS = {
    **dict.fromkeys(WEB, ("runtime/serve/http", *PROTOCOLS)),
    "cuda": ("engines/cuda",),
    "tensorrt": ("engines/tensorrt",),
    "tensorrt_rtx": ("engines/tensorrt",),
    "openvino": ("engines/openvino.py", "engines/openvino"),
    "grpc": ("runtime/serve/kserve",),
    "ray": ("runtime/serve/ray",),
}
# imported inside functions only: a machine without the hardware or the package still imports every module
LATE = ("cuda", "tensorrt", "tensorrt_rtx", "openvino", "pynvml")
# a protocol's folder imports its libraries freely, so nobody else may import the folder at module level;
# a replica of a cluster is a server, and answers by the others' applications
DOORS = ("runtime/serve/__main__.py", "runtime/serve/ray")
FUNCTION_LINES, FILE_LINES = 60, 450
NATIVE = (".c", ".cc", ".cpp", ".cu", ".h", ".hpp")
LONG = re.compile(r"\s*(?:#|//|/\*) long: \S+")
COVERS = re.compile(r"^# covers: (.+)$", re.MULTILINE)
# tests of the whole tree or of whole programs
WHOLE = {"test_architecture", "test_commands", "test_readme", "test_soak"}
# rules that code breaks until it has moved; an entry that is no longer needed fails
PENDING: set[tuple[str, str]] = set()


def allowing_pending(rule: str, broken: set[str]) -> None:
    """Fails for what breaks a rule and is not pending, and for what is pending and breaks nothing."""
    pending = {what for name, what in PENDING if name == rule}
    assert broken <= pending, f"{rule}: {sorted(broken - pending)}"
    assert pending <= broken, f"{rule}: no longer pending: {sorted(pending - broken)}"


def inside(name: str, allowed: set[str] | tuple[str, ...], separator: str = ".") -> bool:
    return any(name == one or name.startswith(one + separator) for one in allowed)


# --- reading the tree ------------------------------------------------------------------------------------------------


@cache
def python_files(*folders: str) -> tuple[Path, ...]:
    return tuple(sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")))


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules() -> Mapping[str, Path]:
    return {module_name(path): path for path in python_files(*PACKAGES)}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path, *, late: bool = True, typing: bool = True) -> set[str]:
    """Names of imported modules; `from a import b` gives `a.b` where that is a module of ours, else `a`.

    Without `late` those at module level only; without `typing` none that only a type checker executes.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{place(path)}:{node.lineno}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(name if name in modules() else node.module for name in names)
        for child in ast.iter_child_nodes(node):
            inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            checker = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if (late or not inner) and (typing or not checker):
                visit(child)

    visit(tree(path))
    return found


# --- imports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_one_way(folder: str) -> None:
    wrong = {}
    for path in python_files(folder):
        own = {name for name in imports(path) if name.split(".")[0] in (*PACKAGES, "tests")}
        if outside := {name for name in own if not inside(name, ALLOWED[folder])}:
            wrong[place(path)] = outside
    assert not wrong


def test_no_circle_between_modules() -> None:
    """Late imports count: two modules that need each other are one module, or lack a third below both."""
    graph = {name: imports(path, typing=False) & modules().keys() - {name} for name, path in modules().items()}
    left = dict(graph)
    while leaves := {name for name, needed in left.items() if not needed & left.keys()}:
        left = {name: needed for name, needed in left.items() if name not in leaves}
    circle = {name: sorted(needed & left.keys()) for name, needed in left.items()}
    assert not circle, f"on or above a circle: {circle}"


@pytest.mark.parametrize("package", ["engines", "runtime"])
def test_what_a_server_runs_imports_no_torch(package: str) -> None:
    wrong = {
        (place(path), name) for path in python_files(package) for name in imports(path) if name.split(".")[0] in TORCH
    }
    assert not wrong


@pytest.mark.parametrize("library", ROOMS)
def test_a_foreign_library_stays_in_its_room(library: str) -> None:
    for path in python_files(*PACKAGES):
        if inside(library, {name.split(".")[0] for name in imports(path)}):
            assert inside(place(path), ROOMS[library], "/"), f"{place(path)} imports {library}"


@pytest.mark.parametrize("library", LATE)
def test_what_may_be_missing_is_imported_late(library: str) -> None:
    for path in python_files(*PACKAGES):
        early = {name.split(".")[0] for name in imports(path, late=False, typing=False)}
        assert library not in early, f"{place(path)} imports {library} at module level"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_protocol_is_imported_late(protocol: str) -> None:
    room = protocol.replace("/", ".")
    for path in python_files(*PACKAGES):
        if not inside(place(path), (*DOORS, protocol), "/"):
            early = {name for name in imports(path, late=False, typing=False) if inside(name, {room})}
            assert not early, f"{place(path)} imports {early}"


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("runtime", (*TORCH, *ROOMS, "onnxruntime")),
        ("runtime.pipeline", (*TORCH, *ROOMS)),
        ("runtime.sampling.function", (*TORCH, *ROOMS, "onnxruntime")),
        ("runtime.serve.service", (*TORCH, *ROOMS)),
        ("runtime.serve.__main__", (*TORCH, *sorted(ROOMS.keys() - set(WEB)))),
    ],
)
def test_importing_stays_light(module: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {unwanted!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# --- sizes -----------------------------------------------------------------------------------------------------------


def functions(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, the line above its first decorator, and number of lines from `def`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            above = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            assert node.end_lineno is not None
            yield node.name, above, node.end_lineno - node.lineno + 1


def head(path: Path) -> int:
    """The line of the first statement after the docstring."""
    body = tree(path).body[1 if ast.get_docstring(tree(path)) else 0 :]
    return body[0].lineno if body else 0


def long_comments(lines: list[str]) -> set[int]:
    return {number for number, line in enumerate(lines, 1) if LONG.match(line)}


def test_functions_fit_a_screen() -> None:
    broken, idle = set(), set()
    for path in python_files(*PACKAGES, "tests"):
        excused = long_comments(path.read_text().splitlines())
        used = {line for line in excused if line < head(path)}
        for name, above, lines in functions(path):
            if lines > FUNCTION_LINES and above in excused:
                used.add(above)
            elif lines > FUNCTION_LINES:
                broken.add(f"{place(path)}: {name}")
        idle |= {f"{place(path)}:{line}" for line in excused - used}
    allowing_pending("function", broken)
    assert not idle, f"`long:` where nothing is: {idle}"


def test_files_have_one_subject() -> None:
    broken, idle = set(), set()
    folders = ("kernels", "runtime", "tests")
    native = {path for folder in folders for path in (ROOT / folder).rglob("*.*") if path.suffix in NATIVE}
    for path in {*python_files(*PACKAGES, "tests"), *native}:
        lines = path.read_text().splitlines()
        first = head(path) if path.suffix == ".py" else 20
        excused = any(line < first for line in long_comments(lines))
        if len(lines) > FILE_LINES and not excused:
            broken.add(place(path))
        elif excused and len(lines) <= FILE_LINES:
            idle.add(place(path))
    allowing_pending("file", broken)
    assert not idle, f"`long:` in files that are not: {idle}"


def test_no_drawer() -> None:
    drawers = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    assert not [place(path) for path in python_files(*PACKAGES, "tests") if path.name in drawers]


# --- tests -----------------------------------------------------------------------------------------------------------


def mirrored(path: Path) -> bool:
    """tests/A/B/test_c.py stands for A/B/c.*, for the folder A/B/c, or, when B is c, for the whole folder A/B."""
    folder, name = path.parent.relative_to(ROOT / "tests"), path.stem.removeprefix("test_")
    source = ROOT / folder
    return (source / name).is_dir() or source.name == name or any(source.glob(f"{name}.*"))


def test_tests_mirror_the_folders() -> None:
    broken = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        covers = COVERS.search(path.read_text())
        if covers:
            missing = [name for name in covers[1].split(", ") if not (ROOT / name).exists()]
            assert not missing, f"{place(path)} covers {missing}, which is not there"
            assert not mirrored(path), f"{place(path)} needs no `covers:`"
        elif not (mirrored(path) or (path.parent == ROOT / "tests" and path.stem in WHOLE)):
            broken.add(place(path))
    allowing_pending("mirror", broken)


# --- the top level ---------------------------------------------------------------------------------------------------


def test_kernels_is_no_package() -> None:
    """A distribution called `kernels` exists; an `__init__.py` here would hide it from diffusers."""
    assert (ROOT / "kernels" / "README.md").is_file()
    assert not list((ROOT / "kernels").glob("*.py"))


@pytest.mark.parametrize(
    "name", ["Makefile", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml", ".ci/run"]
)
def test_the_top_level_is_there(name: str) -> None:
    assert (ROOT / name).is_file()


def test_every_package_is_installed_and_typed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {module_name(path) for path in python_files(*PACKAGES) if path.name == "__init__.py"}
    assert set(project["tool"]["setuptools"]["packages"]) == folders
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)


def test_nothing_is_said_about_one_machine() -> None:
    """The tree is read by strangers: no paths of the machine that it was written on."""
    suffixes = {".py", ".md", ".toml", ".cu", ".cc", ".h", ".html", ".yaml", ".json", ""}
    private = re.compile(r"(?<![\w.])/(?:work|root|home/\w+)/")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = [ROOT / name for name in listed if Path(name).suffix in suffixes and (ROOT / name).is_file()]
    found = [place(path) for path in texts if path != Path(__file__) and private.search(path.read_text())]
    assert not found
