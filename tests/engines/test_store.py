"""Bundles and plans on disk: keyed by everything they depend on, never half written, never half trusted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnxruntime
import pytest

from engines import ort
from engines.__main__ import main
from engines.errors import BundleError
from engines.manifest import MANIFEST
from engines.store import PARTIAL, PLAN, Bundle, delete_leftovers, plan_key, replacing
from tests.copies import DAMAGES, NETWORK, NETWORKS, contents, cut_in_half, small_copy

FIELDS = {"network": "denoiser", "onnx_sha256": "ab" * 32, "runtime": "onnxruntime 1.0", "machine": "Linux CPU (0123)"}
REPAIR = "`make engines MODEL=shapes`"


@pytest.fixture
def bundle(shapes: Bundle, tmp_path: Path) -> Iterator[Bundle]:
    copy = small_copy(shapes, tmp_path / "build" / "shapes")
    yield copy
    shutil.rmtree(copy.folder)  # pytest keeps the folders of its last three runs


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A folder with one file, to be replaced."""
    folder = tmp_path / "stored"
    folder.mkdir()
    (folder / "file").write_text("old")
    return folder


def fields(bundle: Bundle, network: str = NETWORK) -> dict[str, str]:
    return ort.plan_fields(bundle, network)


def plan_path(bundle: Bundle, file: str | None = None, network: str = NETWORK) -> Path:
    """The compiled file of a network's plan here, or another file beside it."""
    key = plan_key(fields(bundle, network))
    return bundle.plan_folder(key) / (file or bundle.plans()[key].file.name)


def add_plan(bundle: Bundle, plan_fields: dict[str, str]) -> None:
    source = bundle.folder / "compiled"
    source.write_text("compiled")
    bundle.add_plan(NETWORK, plan_fields, [source], 0.0)


def partials(folder: Path) -> list[Path]:
    return list(folder.rglob(f"{PARTIAL}*"))


def collect_garbage(monkeypatch: pytest.MonkeyPatch, build: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["engines", "gc", "--build", str(build)])
    return main()


# keys


@pytest.mark.parametrize("field", FIELDS)
def test_a_plan_key_depends_on_every_field(field: str) -> None:
    without = {name: value for name, value in FIELDS.items() if name != field}
    others = [
        without,
        FIELDS | {field: FIELDS[field] + "x"},
        FIELDS | {field: ""},
        without | {f"{field}_": FIELDS[field]},
    ]
    assert len({plan_key(other) for other in (FIELDS, *others)}) == 5


def test_a_plan_key_depends_on_no_order() -> None:
    assert plan_key(dict(reversed(FIELDS.items()))) == plan_key(FIELDS)


def another_cpu(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> Bundle:
    monkeypatch.setattr(ort, "machine", lambda: "Linux Another CPU (01234567)")
    return bundle


def another_runtime(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> Bundle:
    monkeypatch.setattr(onnxruntime, "__version__", "0.0.1")
    return bundle


def another_export(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> Bundle:
    networks = dict(bundle.manifest.networks)
    file = networks[NETWORK].file.model_copy(update={"sha256": "01" * 32})
    networks[NETWORK] = networks[NETWORK].model_copy(update={"file": file})
    return Bundle(bundle.folder, bundle.manifest.model_copy(update={"networks": networks}))


@pytest.mark.parametrize(
    ("field", "now", "change"),
    [
        ("machine", "Linux Another CPU (01234567)", another_cpu),
        ("runtime", "onnxruntime 0.0.1", another_runtime),
        ("onnx_sha256", "01" * 32, another_export),
    ],
)
def test_a_plan_for_something_else_is_not_used_and_just_the_difference_is_named(
    field: str,
    now: str,
    change: Callable[[pytest.MonkeyPatch, Bundle], Bundle],
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = fields(bundle)[field]
    changed = change(monkeypatch, bundle)
    reason = f"{field}: built for {built}, now {now}"
    assert changed.explain(NETWORK, fields(changed)) == [reason]
    with pytest.raises(BundleError) as error:
        ort.Session(changed, NETWORK, 1)
    assert str(error.value) == f"no compiled {NETWORK} for this machine ({reason}): build it with {REPAIR}"


def test_explain_compares_with_the_nearest_plan(bundle: Bundle) -> None:
    asked = fields(bundle) | {"machine": "this", "runtime": "this"}
    add_plan(bundle, asked | {"machine": "far", "runtime": "far", "precision": "far"})
    add_plan(bundle, asked | {"machine": "near"})
    assert bundle.explain(NETWORK, asked) == ["machine: built for near, now this"]


def test_explain_says_nothing_of_a_plan_that_fits(bundle: Bundle) -> None:
    assert bundle.explain(NETWORK, fields(bundle)) == []


def test_explain_says_when_nothing_was_ever_built(bundle: Bundle) -> None:
    shutil.rmtree(bundle.folder / "plans")
    assert bundle.explain(NETWORK, fields(bundle)) == [f"no plan of {NETWORK} was ever built here"]


# damage


def onnx_path(bundle: Bundle) -> Path:
    return bundle.folder / bundle.manifest.networks[NETWORK].file.name


def tokenizer_path(bundle: Bundle) -> Path:
    return bundle.folder / bundle.manifest.tokenizers[0].file.name


def sidecar_path(bundle: Bundle) -> Path:
    return plan_path(bundle, PLAN)


def load(bundle: Bundle) -> object:
    return ort.Session(bundle, NETWORK, 1)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("find", "use"),
    [
        (onnx_path, lambda bundle: bundle.onnx(NETWORK)),
        (tokenizer_path, lambda bundle: bundle.tokenizer(bundle.manifest.tokenizers[0])),
        (plan_path, load),
        (sidecar_path, load),
    ],
    ids=["onnx", "tokenizer", "plan", "sidecar"],
)
def test_a_damaged_file_is_refused_by_name_and_verify_finds_it(
    find: Callable[[Bundle], Path], use: Callable[[Bundle], object], damage: str, bundle: Bundle
) -> None:
    path = find(bundle)
    assert use(bundle) and bundle.problems() == []
    DAMAGES[damage](path)
    with pytest.raises(BundleError) as error:
        use(bundle)
    assert str(path) in str(error.value) and REPAIR in str(error.value)
    (problem,) = bundle.problems()
    assert str(path) in problem and REPAIR in problem


def test_a_sidecar_with_another_field_than_its_key_is_made_of_is_refused(bundle: Bundle) -> None:
    path = sidecar_path(bundle)
    path.write_text(path.read_text().replace("CPUExecutionProvider", "AnotherProvider"))
    with pytest.raises(BundleError, match=f"{path} is missing or damaged.*{REPAIR}"):
        load(bundle)


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("colour", lambda text: json.dumps(json.loads(text) | {"colour": "red"})),
        ("schema_version", lambda text: json.dumps(json.loads(text) | {"schema_version": 1})),
        ("networks", lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "networks"})),
        ("Invalid JSON", lambda text: text[: len(text) // 2]),
        ("Invalid JSON", lambda text: ""),
        ("Invalid JSON", lambda text: "\0" * len(text)),
        ("the file", lambda text: "[]"),
    ],
    ids=["unknown field", "other version", "missing field", "truncated", "empty", "zeros", "list"],
)
def test_a_manifest_that_is_not_understood_is_refused(words: str, change: Callable[[str], str], bundle: Bundle) -> None:
    path = bundle.folder / MANIFEST
    path.write_text(change(path.read_text()))
    with pytest.raises(BundleError) as error:
        Bundle.open("shapes", bundle.folder.parent)
    message = str(error.value)
    assert str(path) in message and words in message and REPAIR in message and "\n" not in message


def test_a_model_that_is_not_exported_is_refused_with_those_that_are(bundle: Bundle) -> None:
    with pytest.raises(
        BundleError, match=r"no exported model 'shape' \(exported: shapes\).*`make engines MODEL=shape`"
    ):
        Bundle.open("shape", bundle.folder.parent)
    (bundle.folder / MANIFEST).unlink()
    with pytest.raises(BundleError, match=rf"no exported model 'shapes' \(exported: none yet\).*{REPAIR}"):
        Bundle.open("shapes", bundle.folder.parent)


def test_a_bundle_opens_by_name_and_by_folder(bundle: Bundle) -> None:
    for name in ("shapes", str(bundle.folder)):
        opened = Bundle.open(name, bundle.folder.parent)
        assert opened.folder == bundle.folder and opened.manifest == bundle.manifest


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", [None, PLAN], ids=["plan", "sidecar"])
def test_a_damaged_plan_is_rebuilt_and_an_intact_one_is_left_alone(
    file: str | None, damage: str, bundle: Bundle
) -> None:
    path, others = plan_path(bundle, file), [plan_path(bundle, name, NETWORKS[1]) for name in (None, PLAN)]
    before = [other.stat().st_mtime_ns for other in others]
    DAMAGES[damage](path)
    built = ort.build_missing(bundle)
    assert [network for network, plan in built.items() if plan] == [NETWORK]
    assert [other.stat().st_mtime_ns for other in others] == before
    assert bundle.problems() == [] and partials(bundle.folder.parent) == []
    assert load(bundle)
    assert not any(ort.build_missing(bundle).values())


def test_a_damaged_source_is_not_compiled(bundle: Bundle) -> None:
    shutil.rmtree(bundle.folder / "plans")
    cut_in_half(onnx_path(bundle))
    with pytest.raises(BundleError, match=REPAIR):
        ort.build_missing(bundle)
    assert bundle.plans() == {}


# replacing


def test_replacing_puts_the_new_folder_in_place_of_the_old(stored: Path) -> None:
    with replacing(stored) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "other").write_text("new")
        assert contents(stored).keys() == {"file"}
    assert contents(stored).keys() == {"sub/other"} and stored.stat().st_mode & 0o777 == 0o755
    assert partials(stored.parent) == []


def test_replacing_makes_a_folder_that_was_not_there(tmp_path: Path) -> None:
    with replacing(tmp_path / "not" / "yet") as partial:
        (partial / "file").write_text("new")
    assert contents(tmp_path).keys() == {"not/yet/file"} and partials(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_replacing_leaves_the_old_folder_and_nothing_else_when_the_block_raises(
    error: type[BaseException], stored: Path
) -> None:
    before = contents(stored.parent)
    with pytest.raises(error), replacing(stored) as partial:
        (partial / "file").write_text("new")
        raise error
    assert contents(stored.parent) == before and partials(stored.parent) == []


def no_space(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FULL_DISK = [(os, "fsync"), (os, "replace"), (Path, "write_text"), (shutil, "move")]


@pytest.mark.parametrize(("owner", "function"), FULL_DISK, ids=[function for _, function in FULL_DISK])
@pytest.mark.parametrize("there", [True, False], ids=["replaced", "new"])
def test_a_full_disk_leaves_plans_as_they_were(
    there: bool, owner: object, function: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = contents(bundle.folder)
    source = tmp_path / "compiled"
    source.write_text("compiled")
    monkeypatch.setattr(owner, function, no_space)
    with pytest.raises(OSError, match="No space left"):
        bundle.add_plan(NETWORK, fields(bundle) | ({} if there else {"machine": "another"}), [source], 0.0)
    monkeypatch.undo()
    assert contents(bundle.folder) == before and partials(bundle.folder) == []


SMALL_FILES = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
sys.argv = ["engines", "build", "--build", sys.argv[1]]
runpy.run_module("engines", run_name="__main__")
"""


def test_a_build_that_cannot_write_ends_with_one_message_and_changes_nothing(bundle: Bundle, checkout: Path) -> None:
    plan_path(bundle).unlink()
    before = contents(bundle.folder.parent)
    command = [sys.executable, "-c", SMALL_FILES, str(bundle.folder.parent)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    *_, line = done.stderr.replace("\r", "\n").splitlines()
    assert line.strip().startswith("error: ")
    assert contents(bundle.folder.parent) == before and partials(bundle.folder.parent) == []


# killed and concurrent builds

WRITE = """
import shutil, sys
from pathlib import Path
from engines.store import locked, replacing
source, folder = Path(sys.argv[1]), Path(sys.argv[2])
with locked(folder), replacing(folder) as partial:
    shutil.copytree(source, partial, dirs_exist_ok=True)
    print("written", flush=True)
    sys.stdin.read()
"""


def start_writing(source: Path, folder: Path, checkout: Path) -> subprocess.Popen[str]:
    """A process that has written everything and not yet put it in its place; it goes on when its input is closed."""
    command = [sys.executable, "-c", WRITE, str(source), str(folder)]
    process = subprocess.Popen(command, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    return process


def kill_while_writing(source: Path, folder: Path, checkout: Path) -> None:
    with start_writing(source, folder, checkout) as process:
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert len(partials(folder.parent)) == 1


@pytest.mark.parametrize("there", [True, False], ids=["replaced", "new"])
def test_a_killed_build_of_a_plan_is_not_trusted_and_gc_removes_it(
    there: bool, bundle: Bundle, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, source = bundle.plan_folder(plan_key(fields(bundle))), tmp_path / "source"
    shutil.copytree(folder, source)
    if not there:
        shutil.rmtree(folder)
    before, plans = contents(bundle.folder), bundle.plans()
    kill_while_writing(source, folder, checkout)
    assert bundle.plans() == plans and bundle.has_intact_plan(fields(bundle)) == there and bundle.problems() == []
    assert collect_garbage(monkeypatch, bundle.folder.parent) == 0
    assert contents(bundle.folder) == before and partials(tmp_path) == []


@pytest.mark.parametrize("name", ["shapes", "another"])
def test_a_killed_export_is_not_trusted_and_gc_removes_it(
    name: str, bundle: Bundle, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = bundle.folder.parent
    before = contents(build)
    kill_while_writing(bundle.folder, build / name, checkout)
    with pytest.raises(BundleError, match=r"\(exported: shapes\)"):
        Bundle.open("nothing", build)
    monkeypatch.setattr(sys, "argv", ["engines", "list", "--build", str(build)])
    assert main() == 0 and capsys.readouterr().out.count("StableDiffusionPipeline") == 1
    assert collect_garbage(monkeypatch, build) == 0
    assert contents(build) == before and partials(build) == []


def test_gc_removes_what_the_killed_first_export_left(
    bundle: Bundle, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tmp_path / "first"
    kill_while_writing(bundle.folder, build / "shapes", checkout)
    assert collect_garbage(monkeypatch, build) == 0
    assert contents(build) == {}


def test_gc_waits_for_a_running_export_and_deletes_nothing_of_it(bundle: Bundle, checkout: Path) -> None:
    build = bundle.folder.parent
    with ThreadPoolExecutor() as pool, start_writing(bundle.folder, build / "another", checkout) as process:
        deleting = pool.submit(delete_leftovers, build)
        time.sleep(0.5)
        assert not deleting.done() and len(partials(build)) == 1
        process.communicate()
        assert deleting.result(60) == []
    assert process.returncode == 0 and contents(build / "another") == contents(bundle.folder)
    shutil.rmtree(build / "another")


def test_two_builds_at_once_end_with_one_intact_plan_per_network(bundle: Bundle, checkout: Path) -> None:
    shutil.rmtree(bundle.folder / "plans")
    command = [sys.executable, "-m", "engines", "build", "shapes", "--build", str(bundle.folder.parent)]
    processes = [subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = "".join(process.communicate()[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    for network in NETWORKS:
        assert printed.count(f"{network} compiled") == printed.count(f"{network} is up to date") == 1
    assert {plan.network for plan in bundle.plans().values()} == set(NETWORKS) and len(bundle.plans()) == len(NETWORKS)
    assert bundle.problems() == [] and partials(bundle.folder.parent) == []


def test_gc_deletes_plans_that_fit_nothing_here_and_keeps_the_others(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_plan(bundle, fields(bundle) | {"machine": "another"})
    (bundle.folder / "plans" / "0123456789abcdef").mkdir()
    foreign = {plan_key(fields(bundle) | {"machine": "another"}), "0123456789abcdef"}
    current = {plan_key(fields(bundle, network)) for network in NETWORKS}
    assert collect_garbage(monkeypatch, bundle.folder.parent) == 0
    printed = capsys.readouterr().out
    assert all(str(bundle.plan_folder(key)) in printed for key in foreign) and len(printed.splitlines()) == 2
    assert {path.name for path in (bundle.folder / "plans").iterdir()} == current
    assert bundle.problems() == [] and load(bundle)
    assert collect_garbage(monkeypatch, bundle.folder.parent) == 0 and capsys.readouterr().out == ""
