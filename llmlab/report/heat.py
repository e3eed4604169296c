"""A table of shares as a picture: a square for each, darker where more."""

from collections.abc import Sequence

from llmlab.report.page import escape

CELL, LEFT, TOP = 64, 60, 24


def heat_map(title: str, rows: Sequence[str], columns: Sequence[str], shares: Sequence[Sequence[float]]) -> str:
    """A figure of these shares, from 0 to 1, each written in its square."""
    width, height = LEFT + CELL * len(columns), TOP + CELL // 2 * len(rows)
    cells = [
        f'<rect x="{LEFT + CELL * x}" y="{TOP + CELL // 2 * y}" width="{CELL - 2}" height="{CELL // 2 - 2}" '
        f'fill="currentColor" fill-opacity="{0.06 + 0.6 * share:.2f}"/>'
        f'<text x="{LEFT + CELL * x + CELL / 2 - 1}" y="{TOP + CELL // 2 * y + CELL / 4 + 3}" '
        f'text-anchor="middle">{share:.0%}</text>'
        for y, line in enumerate(shares)
        for x, share in enumerate(line)
    ]
    names = [
        f'<text x="{LEFT - 8}" y="{TOP + CELL // 2 * y + CELL / 4 + 3}" text-anchor="end">{escape(name)}</text>'
        for y, name in enumerate(rows)
    ]
    names += [
        f'<text x="{LEFT + CELL * x + CELL / 2 - 1}" y="{TOP - 8}" text-anchor="middle">{escape(name)}</text>'
        for x, name in enumerate(columns)
    ]
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg class="chart" viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="{escape(title)}">' + "".join([*cells, *names]) + "</svg></figure>"
    )
