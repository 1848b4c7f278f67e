"""The example programs, and the ways in which a stranger's build finds the library."""
# covers: runtime/embed/example, runtime/embed/CMakeLists.txt, runtime/embed/include/driffusion.hpp

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.store import Bundle
from runtime.embed.building import SOURCE
from runtime.pipeline import Pipeline
from tests.runtime.embed.building import built, command, configured
from tests.runtime.embed.conftest import Write

PROMPT = "a large red star at the left on blue background"


@pytest.mark.parametrize(("program", "suffix"), [("draw_c", "ppm"), ("draw", "png")])
def test_an_image_is_drawn(
    shapes: Bundle, pipeline: Pipeline, write: Write, tmp_path: Path, program: str, suffix: str
) -> None:
    out = tmp_path / f"image.{suffix}"
    command(built(f"example/{program}"), shapes.folder, write(), PROMPT, out, "18446744073709551615")
    own = pipeline.generate(PROMPT, mode="aggressive", k=2, num_inference_steps=4, seed=2**64 - 1)
    with Image.open(out) as image:
        image.load()
        np.testing.assert_array_equal(np.asarray(image), np.asarray(own.images[0]))


@pytest.mark.parametrize("program", ["draw_c", "draw"])
def test_what_goes_wrong_is_said(shapes: Bundle, write: Write, tmp_path: Path, program: str) -> None:
    for words in ([tmp_path / "none", write()], [shapes.folder, shapes.folder / "manifest.json"]):
        run = subprocess.run(
            [built(f"example/{program}"), *words, PROMPT, tmp_path / "image"], capture_output=True, text=True
        )
        assert run.returncode == 1
        assert "error: " in run.stderr and str(words[0] if "none" in str(words[0]) else "program") in run.stderr


def test_the_server_loop(shapes: Bundle, write: Write, tmp_path: Path) -> None:
    """Two images at once with previews, one of them cancelled, and a line that means nothing."""
    arguments = [built("example/serve"), shapes.folder, write(num_inference_steps=40), tmp_path]
    with subprocess.Popen([*map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdin and run.stdout
        run.stdin.write(f"draw one 1 {PROMPT}\ndraw two 2 a ring\ndance\n")
        run.stdin.flush()
        lines = [run.stdout.readline()]
        while not lines[-1].startswith("preview two"):
            assert lines[-1], lines
            lines.append(run.stdout.readline())
        run.stdin.write("cancel two\n")
        run.stdin.close()
        lines += run.stdout.readlines()
    assert run.returncode == 0
    said = "".join(lines)
    assert "what? dance" in said and "preview one 10" in said and re.search(r"^done one \d", said, re.MULTILINE)
    assert re.search(r"^failed two CANCELLED: cancelled after \d+ steps$", said, re.MULTILINE)
    for name in ("one.png", "two.preview.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size == (64, 64)
    assert not (tmp_path / "two.png").exists()


def test_an_installed_library_is_found(shapes: Bundle, write: Write, tmp_path: Path) -> None:
    """By find_package, with the examples as the stranger's project, and by pkg-config."""
    prefix = tmp_path / "prefix"
    built()
    command("cmake", "--install", configured("plain"), "--prefix", prefix)
    other = tmp_path / "other"
    command("cmake", "-S", SOURCE / "example", "-B", other, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}")
    command("cmake", "--build", other, "--target", "draw_c", "draw")
    program = write(num_inference_steps=1)
    command(other / "draw_c", shapes.folder, program, PROMPT, tmp_path / "image.ppm")
    command(other / "draw", shapes.folder, program, PROMPT, tmp_path / "image.png")
    (folder,) = prefix.glob("lib*/**/pkgconfig")
    moved = tmp_path / "moved"
    prefix.rename(moved)  # the flags follow
    flags = command(
        "env", f"PKG_CONFIG_PATH={moved / folder.relative_to(prefix)}", "pkg-config", "--cflags", "--libs", "driffusion"
    ).split()
    library = next(moved.rglob("libdriffusion.so.1")).parent
    command("cc", "-std=c11", SOURCE / "example" / "draw.c", "-o", tmp_path / "draw", *flags, f"-Wl,-rpath,{library}")
    command(tmp_path / "draw", shapes.folder, program, PROMPT, tmp_path / "again.ppm")
    assert (tmp_path / "again.ppm").read_bytes() == (tmp_path / "image.ppm").read_bytes()


def test_all_that_the_wrapper_has(shapes: Bundle, write: Write) -> None:
    """Several images, token ids, the caller's latents and noise; native/stress_gpu.cc has outputs in device memory."""
    program = write(scheduler="euler_a", num_inference_steps=2)
    assert command(built("tests/wrapper"), shapes.folder, program) == "good\n"


def test_the_program_of_the_page(shapes: Bundle, write: Write, tmp_path: Path) -> None:
    """The C++ block of the library's README, compiled without warnings and run."""
    (code,) = re.findall(r"```cpp\n(.*?)```", (SOURCE / "README.md").read_text(), re.DOTALL)
    source, program = tmp_path / "page.cc", tmp_path / "page"
    source.write_text(code)
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{SOURCE / 'include'}"]
    command("c++", *flags, source, "-o", program, f"-L{built().parent}", "-ldriffusion", f"-Wl,-rpath,{built().parent}")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "shapes").symlink_to(shapes.folder)
    write("shapes.program", num_inference_steps=24)
    said = command(program, cwd=tmp_path).splitlines()
    assert said == ["64x64 after 10 steps", "64x64 after 20 steps", "12288 bytes in 13 rounds"]
