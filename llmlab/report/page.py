"""The HTML around a report: one file, no script, nothing fetched, light or dark as the reader's system is."""

import html
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Control characters, which HTML forbids or hides, as the symbols that stand for them.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}

COLOURS = 8
DASHES = 4


class Html(str):
    """Text that is markup already."""


def escape(value: Any) -> str:
    """`value` as text that no browser takes for markup."""
    if isinstance(value, Html):
        return str(value)
    return html.escape(str(value).translate(CONTROLS).encode(errors="replace").decode())


def page(title: str, subtitle: str, sections: Iterable[str]) -> bytes:
    """The whole file."""
    body = "\n".join(section for section in sections if section)
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>
<main>
{body}
</main>
</body>
</html>
"""
    return text.encode()


def section(name: str, title: str, content: str) -> str:
    """A titled part of the page; nothing where there is no content."""
    return f'<section id="{escape(name)}"><h2>{escape(title)}</h2>\n{content}\n</section>' if content else ""


def tiles(facts: Iterable[tuple[str, str, str]]) -> str:
    """Headline numbers: (label, value, what to compare it with)."""
    return _wrap(
        '<div class="tiles">',
        [
            f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd><small>{escape(note)}</small></div>"
            for label, value, note in facts
        ],
        "</div>",
    )


def link(target: str) -> Html:
    """A way to another page, by its path from this one."""
    return Html(f'<a href="{escape(urllib.parse.quote(target))}">{escape(target)}</a>')


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table that scrolls sideways where it is too wide. Numbers should come formatted."""
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{chr(10).join(lines)}</tbody></table></div>'
    )


def pairs(facts: Mapping[str, Any]) -> str:
    """Names and values, a line each."""
    rows = [f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items()]
    return _wrap('<div class="wide"><table class="pairs"><tbody>', rows, "</tbody></table></div>")


def fold(summary: str, content: str, *, unfolded: bool = False) -> str:
    """Content that a click opens."""
    return f"<details{' open' if unfolded else ''}><summary>{escape(summary)}</summary>{content}</details>"


def verbatim(text: str) -> str:
    """Text as it is, lines wrapped."""
    return f"<pre>{escape(text)}</pre>"


def swatch(index: int) -> Html:
    """The stroke of curve number `index`."""
    return Html(
        f'<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true">'
        f'<line class="curve {stroke(index)}" x1="0" y1="4" x2="24" y2="4"/></svg>'
    )


def stroke(index: int) -> str:
    """The classes that tell curve number `index` from the others: a colour, then a dash."""
    return f"c{index % COLOURS} d{index // COLOURS % DASHES}"


def _wrap(before: str, parts: Sequence[str], after: str) -> str:
    return "\n".join([before, *parts, after]) if parts else ""


_LIGHT = ("#2f6fde", "#e07a1f", "#1f9d6b", "#cf3f4f", "#8557d3", "#1396a8", "#c2458f", "#7d8c1f")
_DARK = ("#7aa8ff", "#ffab5e", "#5fd3a0", "#ff8790", "#b99bff", "#5fd0e0", "#f28cc4", "#c3d155")


def _palette(colours: Sequence[str]) -> str:
    return " ".join(f"--c{i}: {colour};" for i, colour in enumerate(colours))


STYLE = f"""
:root {{ --paper: #fbfbfa; --card: #fff; --ink: #1d2430; --soft: #667080; --rule: #e3e6ea; {_palette(_LIGHT)} }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #14171c; --card: #1c2027; --ink: #e6e9ee; --soft: #98a2b0; --rule: #303742; {_palette(_DARK)} }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1080px; padding: 24px 16px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; -webkit-text-size-adjust: 100%; }}
h1 {{ font-size: 26px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 17px; margin: 36px 0 12px; }}
header p {{ color: var(--soft); margin: 4px 0 20px; overflow-wrap: anywhere; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 10px; }}
.tiles > div, figure, details, .wide {{ background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }}
.tiles > div {{ padding: 10px 14px; }}
dt, small {{ color: var(--soft); font-size: 12.5px; }}
dd {{ margin: 0; font-size: 23px; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.3; }}
small {{ display: block; min-height: 1.5em; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 12px; }}
figure {{ margin: 0; padding: 12px 14px 10px; min-width: 0; }}
figcaption {{ font-weight: 600; font-size: 14px; }}
figure svg.chart {{ display: block; width: 100%; height: auto; margin-top: 4px; }}
.chart text {{ fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums; }}
.grid {{ stroke: var(--rule); }}
.base {{ stroke: var(--soft); stroke-opacity: 0.6; }}
.curve {{ fill: none; stroke: var(--line); stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }}
.dot {{ fill: var(--line); stroke: var(--card); stroke-width: 1; }}
{"".join(f".c{i} {{ --line: var(--c{i}); }} " for i in range(COLOURS))}
.d1 {{ stroke-dasharray: 7 4; }} .d2 {{ stroke-dasharray: 2 4; }} .d3 {{ stroke-dasharray: 9 4 2 4; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 4px 0 0; padding: 0; list-style: none;
  color: var(--soft); font-size: 12.5px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }}
.swatch {{ width: 24px; height: 8px; margin-right: 6px; vertical-align: middle; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: 6px 12px; border-top: 1px solid var(--rule); vertical-align: top; }}
tr:first-child > td, thead th, .pairs tr:first-child > th {{ border-top: 0; }}
thead th {{ color: var(--soft); font-weight: 600; white-space: nowrap; border-bottom: 1px solid var(--rule); }}
.pairs th {{ color: var(--soft); font-weight: 400; width: 1%; white-space: nowrap; }}
.pairs td {{ overflow-wrap: anywhere; }}
@media (max-width: 600px) {{ .pairs th {{ white-space: normal; width: 45%; overflow-wrap: anywhere; }} }}
.turn {{ margin: 0 0 6px; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 150px; }}
.turn b {{ color: var(--soft); font-weight: 600; }}
.turn i {{ color: var(--soft); }}
details {{ padding: 8px 14px; margin-top: 8px; }}
details .wide {{ border: 0; margin-top: 6px; }}
summary {{ cursor: pointer; font-weight: 600; font-size: 14px; }}
pre {{ margin: 10px 0 4px; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }}
"""
