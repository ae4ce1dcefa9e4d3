"""Draw the README's picture of the world: python tests/pictures.py"""
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import SIDE, World  # noqa: E402

ZOOM, GAP, COLUMNS, TEXT = 4, 16, 5, 148
KINDS = ["color", "spot", "corners", "beside", "object", "exist", "texture", "complement", "count", "where"]


def main():
    world, font, cell = World("preferences", "probe", 10000), ImageFont.load_default(14), SIDE * ZOOM
    samples = [next(s for s in (world[i] for i in range(1000 * k, 1000 * k + 1000)) if s.kind == kind)
               for k, kind in enumerate(KINDS)]
    rows = -(-len(samples) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * (cell + GAP) + GAP, rows * (cell + TEXT + GAP) + GAP), "white")
    draw = ImageDraw.Draw(page)
    for k, sample in enumerate(samples):
        x, y = GAP + k % COLUMNS * (cell + GAP), GAP + k // COLUMNS * (cell + TEXT + GAP)
        page.paste(sample.image.resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        (question, answer), y = sample.turns[0], y + cell + 4
        for text, color in ((question, (0, 0, 0)), (answer, (0, 120, 40)), (sample.rejected, (190, 30, 30))):
            for line in textwrap.wrap(text, 27):
                draw.text((x, y), line, fill=color, font=font)
                y += 16
    page.save(ROOT / "pictures" / "world.png")


if __name__ == "__main__":
    main()
