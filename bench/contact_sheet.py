"""A contact sheet: one row per caption, one column per mode, to see what the numbers mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from engines.files import written_whole

CELL, GAP, HEAD, CAPTION = 160, 8, 28, 300
INK, PAPER, WRONG = (30, 30, 30), (250, 250, 250), (190, 30, 30)


def contact_sheet(
    path: Path,
    columns: Sequence[str],
    captions: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    wrong: Sequence[Sequence[Sequence[str]]],
) -> None:
    """Writes a PNG; `images[column][row]`, with the checker's findings beneath each."""
    line = CELL + GAP + 18
    sheet = Image.new("RGB", (CAPTION + len(columns) * (CELL + GAP), HEAD + len(captions) * line), PAPER)
    pen, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(14), ImageFont.load_default(11)
    for column, name in enumerate(columns):
        left = CAPTION + column * (CELL + GAP)
        pen.text((left, 6), name, INK, font)
        for row, image in enumerate(images[column][: len(captions)]):
            top = HEAD + row * line
            sheet.paste(image.resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top))
            if wrong[column][row]:
                pen.text((left, top + CELL + 1), f"wrong: {', '.join(wrong[column][row])}", WRONG, small)
    for row, caption in enumerate(captions):
        pen.multiline_text((GAP, HEAD + row * line + CELL // 3), _wrapped(caption), INK, font, spacing=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        sheet.save(partial, optimize=True)


def _wrapped(caption: str, width: int = 34) -> str:
    lines = [""]
    for word in caption.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
