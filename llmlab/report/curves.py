"""Curves as SVG: axes with round ticks, a polyline for every stretch of finite values, thinned but for their spikes."""

import dataclasses
import math
from collections.abc import Sequence

from llmlab.report.page import escape, stroke, swatch
from llmlab.report.read import Points
from llmlab.train.progress import thousands

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 20, 10, 34
MOST_POINTS = 600
MOST_DOTS = 40
LOG_ABOVE = 100.0


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points in order of x; a y of None is a gap. `index` picks the stroke, `dots` marks every point."""

    label: str
    points: Points
    index: int = 0
    dots: bool = False


def chart(
    title: str,
    curves: Sequence[Curve],
    x_label: str = "step",
    *,
    may_be_log: bool = False,
    from_zero: bool = False,
    log_x: bool = False,
    x_ticks: Sequence[float] = (),
    legend: bool = True,
    last_values: bool = False,
) -> str:
    """A figure of these curves; nothing where no point has a value.

    may_be_log: y is logarithmic where it is positive and spans more than two decades. from_zero: y starts at 0, so
    that small changes look small. x_ticks: where, instead of at round values. last_values: said in
    the legend.
    """
    curves = [curve for curve in curves if _finite(curve)]
    if not curves:
        return ""
    values = [y for curve in curves for _, y in _finite(curve)]
    wide = min(values) > 0 and max(values) / min(values) > LOG_ABOVE
    x_axis = Axis.over([x for curve in curves for x, _ in _finite(curve)], log=log_x)
    y_axis = Axis.over([0.0, *values] if from_zero else values, log=may_be_log and wide)
    keys = "".join(_key(curve, last_values) for curve in curves) if legend else ""
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    lines = [
        f"<figure><figcaption>{escape(title)}</figcaption>",
        f'<svg class="chart" {size} role="img" aria-label="{escape(title)}">',
        _grid(x_axis, y_axis, x_label, x_ticks or x_axis.ticks()),
        *(_draw(curve, x_axis, y_axis) for curve in curves),
        "</svg>",
        f'<ul class="legend">{keys}</ul></figure>' if keys else "</figure>",
    ]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Axis:
    """A range of values, and where on 0 … 1 each lies."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], *, log: bool = False) -> "Axis":
        """The axis that just holds these values; a single one lies in its middle."""
        low, high = min(values), max(values)
        if log:
            return cls(low / 2, high * 2, True) if low == high else cls(low, high, True)
        if low == high:
            room = abs(low) / 2 or 1.0
            return cls(low - room, high + room)
        return cls(low, high)

    def place(self, value: float) -> float:
        """0 at `low`, 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values inside the range, a handful."""
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)


def number_text(value: float) -> str:
    """A short number: 0.003, 1.7, 400, 12k."""
    if abs(value) >= 10_000:
        return ("-" if value < 0 else "") + thousands(abs(value)).replace(".0", "")
    return f"{value:.4g}"


def _ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(nice * power for nice in (1, 2, 2.5, 5, 10) if nice * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5)):
        every = max(1, len(decades) // 6)
        ticks = [step * 10.0**d for d in decades[::every] for step in steps if low <= step * 10.0**d <= high]
        if len(ticks) >= 3:
            break
    return ticks or [low, high]


def _grid(x_axis: Axis, y_axis: Axis, x_label: str, x_ticks: Sequence[float]) -> str:
    base = HEIGHT - BOTTOM
    parts = [f'<line class="base" x1="{LEFT}" y1="{base}" x2="{WIDTH - RIGHT}" y2="{base}"/>']
    for tick in y_axis.ticks():
        y = _y(y_axis, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y}" dy="0.35em" text-anchor="end">{number_text(tick)}</text>')
    for tick in x_ticks:
        x = _x(x_axis, tick)
        parts.append(f'<line class="base" x1="{x}" y1="{base}" x2="{x}" y2="{base + 4}"/>')
        parts.append(f'<text x="{x}" y="{base + 16}" text-anchor="middle">{number_text(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _key(curve: Curve, last_value: bool) -> str:
    text = f"{curve.label} {number_text(_finite(curve)[-1][1])}" if last_value else curve.label
    return f"<li>{swatch(curve.index)}{escape(text)}</li>"


def _draw(curve: Curve, x_axis: Axis, y_axis: Axis) -> str:
    classes, stretches, finite = stroke(curve.index), _stretches(curve.points), _finite(curve)
    parts = []
    for stretch in stretches:
        if len(stretch) > 1:
            points = " ".join(f"{_x(x_axis, x)},{_y(y_axis, y)}" for x, y in thinned(stretch))
            parts.append(f'<polyline class="curve {classes}" points="{points}"/>')
    alone = [stretch[0] for stretch in stretches if len(stretch) == 1]
    for x, y in finite if curve.dots and len(finite) <= MOST_DOTS else alone:
        said = f"<title>{escape(curve.label)}: {y:.6g} at {x:.10g}</title>"
        parts.append(f'<circle class="dot {classes}" cx="{_x(x_axis, x)}" cy="{_y(y_axis, y)}" r="3">{said}</circle>')
    return "".join(parts)


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `MOST_POINTS` of them: the first, the last, and the lowest and highest of every bin between."""
    bins = MOST_POINTS // 2
    if len(points) <= MOST_POINTS:
        return points
    kept = {0, len(points) - 1}
    for b in range(bins):
        inside = range(b * len(points) // bins, (b + 1) * len(points) // bins)
        kept |= {min(inside, key=lambda i: points[i][1]), max(inside, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def _stretches(points: Points) -> list[list[tuple[float, float]]]:
    stretches: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            stretches.append([])
        else:
            stretches[-1].append((x, y))
    return [stretch for stretch in stretches if stretch]


def _finite(curve: Curve) -> list[tuple[float, float]]:
    return [(x, y) for x, y in curve.points if y is not None]


def _x(axis: Axis, value: float) -> float:
    return round(LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT), 2)


def _y(axis: Axis, value: float) -> float:
    return round(HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM), 2)
