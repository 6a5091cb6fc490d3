"""Pictures as inline SVG. Horizontal places are percentages, so that a picture is as wide as its page and its text is
never scaled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qlora.reporting.page.html import Html, tag

POINTS = 240  # of a curve; more cannot be told apart
ROW, PLOT = 40, 220  # pixels: a rung of the ladder, the height of a curve
LABEL = 34  # characters of a name that fit beside its value on a phone


@dataclass(frozen=True)
class Dot:
    """A value on a line of its own. `low`, `high`: its interval. `strong`: what the reader looks for."""

    label: str
    value: float
    shown: str
    low: float | None = None
    high: float | None = None
    strong: bool = False


@dataclass(frozen=True)
class Curve:
    """Values over steps. `dots`: there are few, and each is marked."""

    label: str
    kind: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


class Scale:
    """Places of values in percent of the width, linear or logarithmic; `ticks` are round values between."""

    low: float
    high: float

    def __init__(self, values: Sequence[float], *, logarithmic: bool = False, zero: bool = False) -> None:
        self.logarithmic = logarithmic
        low, high = min(values), max(values)
        if logarithmic:
            self.low, self.high = float(math.floor(math.log10(low))), float(math.ceil(math.log10(high)))
            self.high = max(self.high, self.low + 1)
            apart = max(1, math.ceil((self.high - self.low) / 5))
            self.ticks = [10.0**power for power in range(int(self.low), int(self.high) + 1, apart)]
            return
        low = 0.0 if zero else low
        high = high if high > low else low + (abs(low) or 1.0)
        step = _round_step((high - low) / 4)
        self.low = math.floor(low / step + 1e-9) * step
        self.high = math.ceil(high / step - 1e-9) * step
        self.ticks = [self.low + step * index for index in range(round((self.high - self.low) / step) + 1)]

    def place(self, value: float) -> float:
        number = math.log10(value) if self.logarithmic else value
        return round(100 * (number - self.low) / (self.high - self.low), 2)


def _round_step(step: float) -> float:
    """1, 2 or 5 times a power of ten, at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))


def dot_chart(name: str, title: str, description: str, dots: Sequence[Dot], *, logarithmic: bool = False) -> Html:
    """A line per value, its name above it, its interval as whiskers. Of a logarithmic scale, zero lies at its left."""
    ends = [end for dot in dots for end in (dot.value, dot.low, dot.high) if end is not None]
    if logarithmic:
        ends = [end for end in ends if end > 0] or [1e-4]
    scale = Scale(ends, logarithmic=logarithmic, zero=min(ends) >= 0)
    height = ROW * len(dots) + 26

    def place(value: float) -> float:
        return 0.0 if logarithmic and value <= 0 else min(100.0, max(0.0, scale.place(value)))

    plot: list[Html] = []
    for index, tick in enumerate(scale.ticks):
        x = f"{scale.place(tick)}%"
        anchor = "start" if index == 0 else "end" if tick == scale.ticks[-1] and scale.place(tick) > 95 else "middle"
        plot.append(_line(x, 0, x, height - 22, "grid"))
        plot.append(tag("text", _number(tick), x=x, y=height - 6, text_anchor=anchor, class_="tick"))
    for index, dot in enumerate(dots):
        y, x = ROW * index + 27, f"{place(dot.value)}%"
        plot.append(_line("0%", y, "100%", y, "track"))
        if dot.low is not None and dot.high is not None:
            low, high = f"{place(dot.low)}%", f"{place(dot.high)}%"
            plot += [_line(low, y, high, y, "whisker"), _line(low, y - 5, low, y + 5, "whisker")]
            plot.append(_line(high, y - 5, high, y + 5, "whisker"))
        mark = tag("circle", cx=x, cy=y, r=6 if dot.strong else 5, class_="dot strong" if dot.strong else "dot")
        label = "label strong" if dot.strong else "label"
        plot.append(mark)
        plot.append(tag("text", _cut(dot.label), x="0%", y=y - 11, class_=label))
        plot.append(tag("text", dot.shown, x="100%", y=y - 11, text_anchor="end", class_=label))
    return _picture(name, title, description, height, *plot, class_="chart dots")


def curve_chart(name: str, title: str, description: str, curves: Sequence[Curve]) -> Html:
    """Curves over steps, the scale of values at the left, and of steps below."""
    steps = [point[0] for curve in curves for point in curve.points]
    values = sorted(point[1] for curve in curves for point in curve.points)
    # A first loss far above all others would press the rest into a line.
    logarithmic = values[0] > 0 and values[-1] / values[0] > 50
    y_scale = Scale(values, logarithmic=logarithmic, zero=not logarithmic and values[0] >= 0)
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x_of(step: float) -> float:
        return round(100 * (step - first) / (last - first), 2)

    outer: list[Html] = []
    for tick in y_scale.ticks:
        y = round(12 + (PLOT - 12) * (1 - y_scale.place(tick) / 100), 1)
        outer.append(_line("0%", y, "100%", y, "grid"))
        outer.append(tag("text", _number(tick), x="0%", y=y - 3, class_="tick"))
    for index, step in enumerate((first, (first + last) / 2, last)):
        anchor = ("start", "middle", "end")[index]
        words = f"step {step:,.0f}" if index != 1 else f"{step:,.0f}"
        outer.append(tag("text", words, x=f"{50 * index}%", y=PLOT + 18, text_anchor=anchor, class_="tick"))
    drawn: list[Html] = []
    for curve in curves:
        points = [(x_of(step), y_scale.place(loss)) for step, loss in thinned(curve.points)]
        line = " ".join(f"{x:g},{100 - y:g}" for x, y in points)
        drawn.append(tag("polyline", points=line, class_=f"curve {curve.kind}", vector_effect="non-scaling-stroke"))
        if curve.dots:
            for x, y in points:
                cy = round(12 + (PLOT - 12) * (1 - y / 100), 1)
                outer.append(tag("circle", cx=f"{x}%", cy=cy, r=4, class_=f"mark {curve.kind}"))
    box = {"viewBox": "0 0 100 100", "preserveAspectRatio": "none"}
    inner = tag("svg", *drawn, x="0", y="12", width="100%", height=PLOT - 12, overflow="visible", **box)
    return _picture(name, title, description, PLOT + 24, inner, *outer)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS of them, evenly, the first and the last always."""
    if len(points) <= POINTS:
        return list(points)
    return [points[round(index * (len(points) - 1) / (POINTS - 1))] for index in range(POINTS)]


def bar(share: float, expected: float | None) -> Html:
    """A bar of what was used, with a mark at what was expected, both as shares of one width. For the eye alone."""
    parts = [tag("rect", x="0", y="3", width=f"{100 * share:.1f}%", height="8", rx="2", class_="used")]
    if expected is not None:
        x = f"{min(99.5, 100 * expected):.1f}%"
        parts.append(_line(x, 0, x, 14, "expected"))
    return tag("svg", *parts, class_="bar", aria_hidden="true", height="14")


def _picture(name: str, title: str, description: str, height: int, *parts: Html, class_: str = "chart") -> Html:
    titles = tag("title", title, id=f"{name}-title"), tag("desc", description, id=f"{name}-desc")
    labels = {"aria_labelledby": f"{name}-title", "aria_describedby": f"{name}-desc"}
    return tag("svg", *titles, *parts, class_=class_, role="img", height=height, **labels)


def _line(x1: str, y1: float, x2: str, y2: float, kind: str) -> Html:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def _cut(label: str) -> str:
    return label if len(label) <= LABEL else f"{label[: LABEL - 1]}…"


def _number(value: float) -> str:
    return "0" if abs(value) < 1e-12 else f"{value:,.10f}".rstrip("0").rstrip(".")
