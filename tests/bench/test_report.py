"""The page of all results: everything in it comes from files, in both forms, light and dark."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import plots
from bench.page.document import Page, Plot, anchor
from bench.page.tables import MADE_BY, RESULTS, block, made_by, rebuilt
from tests import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the committed results."""
    for path in RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_the_committed_page_is_made_from_the_committed_files() -> None:
    assert (RESULTS / "report.md").read_text() == Page.read(RESULTS).markdown(), "run `python -m bench report`"
    images = re.findall(r"!\[.*?\]\((.*?)\)", (RESULTS / "report.md").read_text())
    assert images and all((RESULTS / name).is_file() for name in images)


def test_both_forms_say_the_same(folder: Path) -> None:
    page = Page.read(folder)
    parts = [part for part in page.parts() if isinstance(part, str)]
    text, html = page.markdown(parts), page.html(parts)
    numbers = re.findall(r"\d+\.\d+", text)
    assert len(numbers) > 500 and set(numbers) <= set(re.findall(r"\d+\.\d+", html))
    assert "http" not in re.sub(r"http://www\.w3\.org\S*", "", html), "one file, no network"


def test_the_page_begins_with_figures_one_plot_and_its_contents(folder: Path) -> None:
    page = Page.read(folder)
    parts = list(page.parts())
    assert str(parts[1]).startswith("## Summary") and isinstance(parts[2], Plot)
    linked = re.findall(r"\]\(#([^)]+)\)", str(parts[3]))
    named = re.findall(r'<h[23] id="([^"]+)"', page.html([part for part in parts[4:] if isinstance(part, str)]))
    assert linked == named and len(named) > 10
    heads = re.findall(r"^##+ (.+)$", "\n".join(part for part in parts if isinstance(part, str)), re.MULTILINE)
    assert [anchor(head) for head in heads[1:]] == linked


def test_the_page_names_every_file_and_machine(folder: Path) -> None:
    text = Page.read(folder).markdown()
    for path in folder.glob("*.json"):
        assert f"`{path.name}`" in text
    assert json.loads((folder / "run.json").read_text())["host"]["processor"] in text


def test_every_file_has_a_section_and_the_command_that_makes_it(folder: Path) -> None:
    parts = [part for part in Page.read(folder).parts() if isinstance(part, str)]
    for path in folder.glob("*.json"):
        beneath = f"`bench/results/{path.name}`, made by `{made_by(path.stem)}`"
        assert any(len(part) > 2 * len(beneath) and beneath in part for part in parts), path.name


def test_the_commands_make_the_files_that_the_page_says() -> None:
    rules = (ROOT / "Makefile").read_text().split("\n\n")
    for target in {made for made in MADE_BY.values() if made.startswith("make ")}:
        (rule,) = [rule for rule in rules if rule.startswith(f"{target.removeprefix('make ')}:")]
        files = set(re.findall(r"--json bench/results/(\w+)\.json", rule))
        assert files == {name for name, made in MADE_BY.items() if made == target}


@pytest.mark.slow
def test_images_follow_light_and_dark(folder: Path) -> None:
    page = Page.read(folder)
    plotted = [part for part in page.parts() if isinstance(part, Plot)]
    html = page.html(plotted)
    assert html.count("<svg") == len(plotted) >= 4
    for name, (light, dark) in plots.COLOURS.items():
        assert f"--{name}: {light}" in html and f"--{name}: {dark}" in html
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "var(--ink)" in drawn and not any(light in drawn for light, _ in plots.COLOURS.values())
    assert "prefers-color-scheme: dark" in html


def test_colours_are_told_apart() -> None:
    """A colour of a plot becomes a variable of the page by its value: no two may be the same."""
    for theme in (0, 1):
        several = [pair[theme] for pair in plots.COLOURS.values()]
        assert len(set(several)) == len(several)


def test_a_folder_with_some_results_makes_a_page_of_those(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in folder.glob("*.json"):
        if path.stem != "kernel":
            path.unlink()
    readme = folder / "README.md"
    readme.write_text("before\n<!-- bench:kernel -->\nold\n<!-- /bench -->\nafter\n")
    monkeypatch.setattr("sys.argv", ["bench", "report", "--results", str(folder), "--readme", str(readme)])
    assert command.main() == 0 and "written" in capsys.readouterr().out
    text = (folder / "report.md").read_text()
    assert "The fused kernel beside" in text and "No GPU run has been committed yet" in text and "![" not in text
    assert readme.read_text() == f"before\n{block('kernel', folder)}\nafter\n" == rebuilt(readme.read_text(), folder)
    monkeypatch.setattr("sys.argv", ["bench", "report", "--results", str(folder / "none"), "--readme", str(readme)])
    assert command.main() == 1 and "error:" in capsys.readouterr().err
