"""Answers as parts of a page: HTML and SVG that need no script and no other file.

Colours and sizes are those of the style sheet ``CSS``, which takes them from the page's theme, light or dark.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from ..errors import printable
from ..evaluation.timeline import Timeline
from .hearing import Classified, Transcribed

_MOST_COLUMNS = 600  # of the strips over time: more are no wider than a pixel
_MOST_LINES = 500  # of the table over time
_TICKS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)  # seconds from one to the next
_MOST_TICKS = 8

CSS = """
.meft { font-size: var(--text-md); color: var(--body-text-color); }
.meft h1 { font-size: 1.6rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.meft h2 { font-size: 1rem; font-weight: 600; margin: 1.4rem 0 0.5rem; }
.meft p { margin: 0.3rem 0 0; }
.meft .quiet { color: var(--neutral-500); font-size: var(--text-sm); }
.dark .meft .quiet { color: var(--neutral-400); }
.meft .answer { font-size: 1.5rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.meft .said { font-size: 1.15rem; line-height: 1.5; margin: 0; overflow-wrap: anywhere; }
.meft .error { border-left: 0.25rem solid #D55E00; padding: 0.5rem 0.8rem; margin: 0;
  overflow-wrap: anywhere; }
.meft table { border-collapse: collapse; width: 100%; }
.meft th, .meft td { padding: 0.2rem 0.6rem 0.2rem 0; text-align: left; font-weight: 400; }
.meft .bars { margin-top: 0.8rem; table-layout: fixed; }
.meft .bars th { width: 30%; overflow-wrap: anywhere; }
.meft .bars .number { width: 4.5rem; text-align: right; padding-right: 0;
  font-variant-numeric: tabular-nums; }
.meft .bars .best { font-weight: 600; }
.meft .bar { height: 0.9rem; background: var(--border-color-primary); border-radius: 0.2rem;
  overflow: hidden; }
.meft .bar div { height: 100%; background: var(--neutral-400); }
.meft .best .bar div { background: var(--color-accent); }
.meft .bars .time { padding-right: 0; }
.meft svg { display: block; width: 100%; height: 2rem; background: var(--background-fill-secondary);
  border-bottom: 1px solid var(--border-color-primary); }
.meft svg .said { fill: var(--color-accent); }
.meft svg .other { fill: var(--neutral-400); opacity: 0.6; }
.meft .axis { position: relative; height: 1.2rem; }
.meft .axis span { position: absolute; transform: translateX(-50%); }
.meft .axis span:first-child { transform: none; }
.meft summary { cursor: pointer; margin-top: 0.6rem; }
.meft .lines { margin-top: 0.4rem; font-size: var(--text-sm); }
.meft .lines thead th { font-weight: 600; }
.meft .lines td { border-top: 1px solid var(--border-color-primary); vertical-align: top; }
.meft .lines td:first-child { white-space: nowrap; font-variant-numeric: tabular-nums; }
"""


def text(value: object) -> str:
    """A label, a name or a message as text of an HTML page."""
    return escape(printable(value))


def clock(seconds: float) -> str:
    """A time in a recording: "0:07", "1:02:03"."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if whole >= 3600 else f"{minutes}:{rest:02}"


def heading(title: str, summary: str) -> str:
    """The top of the page."""
    return f'<div class="meft"><h1>{text(title)}</h1><p class="quiet">{text(summary)}</p></div>'


def note(sentence: str) -> str:
    """A remark."""
    return f'<div class="meft"><p class="quiet">{text(sentence)}</p></div>'


def failure(sentence: str) -> str:
    """Why there is no answer."""
    return f'<div class="meft" id="failure" role="alert"><p class="error">{text(sentence)}</p></div>'


def answer(heard: Classified | Transcribed, top: int) -> str:
    """An answer.

    Args:
        top: classes that are shown, the most probable ones.
    """
    parts = _classified(heard, top) if isinstance(heard, Classified) else _transcribed(heard)
    return f'<div class="meft" role="status">{"".join(parts)}</div>'


def _classified(heard: Classified, top: int) -> Iterable[str]:
    timeline = heard.timeline
    order = np.argsort(-timeline.probabilities, kind="stable")[:top]
    yield f'<p class="answer" id="answer-label">{text(heard.label)}</p>'
    if heard.rejected:
        most = timeline.probabilities[order[0]]
        yield (
            f'<p class="quiet">The most probable class has {most:.1%}, less than the {heard.threshold:.1%} '
            "that are asked for.</p>"
        )
    yield '<table class="bars" aria-label="probabilities">'
    for index in order:
        best = ' class="best"' if index == order[0] and not heard.rejected else ""
        share = timeline.probabilities[index]
        yield (
            f'<tr{best}><th scope="row">{text(timeline.labels[index])}</th>'
            f'<td><div class="bar"><div style="width:{share:.2%}"></div></div></td>'
            f'<td class="number">{share:.1%}</td></tr>'
        )
    yield "</table>"
    rest = len(timeline.labels) - len(order)
    if rest:
        share = 1 - float(timeline.probabilities[order].sum())
        yield f'<p class="quiet">{rest} more {"classes have" if rest > 1 else "class has"} {share:.1%}.</p>'
    if len(timeline.segments) > 1:
        yield from _over_time(heard, order)
    else:
        yield f'<p class="quiet">{timeline.seconds:.1f} seconds were heard.</p>'


def _over_time(heard: Classified, order: Sequence[int]) -> Iterable[str]:
    timeline = heard.timeline
    columns = _Columns.of(heard)
    first, second, *more = timeline.segments
    # Of two windows the second ends with the recording, wherever it would begin otherwise.
    every = f", one every {second.start - first.start:.3g} s" if more else ""
    yield '<h2>Over time</h2><table class="bars" aria-hidden="true">'
    for index in order:
        strip = columns.strip(index)
        yield f'<tr><th>{text(timeline.labels[index])}</th><td class="time">{strip}</td></tr>'
    yield f'<tr><th></th><td class="time">{_axis(timeline.seconds)}</td></tr></table>'
    yield (
        f'<p class="quiet">{timeline.seconds:.1f} seconds were heard, in {len(timeline.segments)} windows of '
        f"{first.end - first.start:.3g} s{every}. The height is the probability; the class that is said is "
        "in colour.</p>"
    )
    yield f"<details><summary>As a table</summary>{_runs(heard)}</details>"


def _edges(timeline: Timeline) -> np.ndarray:
    """Seconds between the times that windows stand for, each what is nearest to its middle, (S + 1,)."""
    middles = np.array([(each.start + each.end) / 2 for each in timeline.segments])
    return np.concatenate([[0.0], (middles[1:] + middles[:-1]) / 2, [timeline.seconds]])


@dataclass(frozen=True)
class _Columns:
    """What the strips over time show: the windows, or the means of so many that follow each other.

    Attributes:
        edges: what lies between them, (C + 1,), from 0 to 1. heights: probabilities, (C, K).
        said: the class that is said in each, (C,), or -1.
    """

    edges: np.ndarray
    heights: np.ndarray
    said: np.ndarray

    @classmethod
    def of(cls, heard: Classified) -> "_Columns":
        # A window in which nothing can be heard has no probabilities.
        rows = np.nan_to_num(np.array([each.probabilities for each in heard.timeline.segments]))
        firsts = np.arange(0, len(rows), -(-len(rows) // _MOST_COLUMNS))
        edges = _edges(heard.timeline)[[*firsts, len(rows)]] / heard.timeline.seconds
        heights = np.add.reduceat(rows, firsts) / np.diff([*firsts, len(rows)])[:, None]
        enough = [most > 0 and heard.is_enough(most) for most in heights.max(1)]
        return cls(edges, heights, np.where(enough, heights.argmax(1), -1))

    def strip(self, index: int) -> str:
        """One class's probability over time: where it is said, and elsewhere."""
        paths = []
        for name, shown in (("said", self.said == index), ("other", self.said != index)):
            path = "".join(
                f"M{1000 * left:.1f} 100V{100 - 100 * p:.1f}H{1000 * right:.1f}V100z"
                for left, right, p in zip(
                    self.edges[:-1][shown], self.edges[1:][shown], self.heights[shown, index]
                )
                if p >= 0.005
            )
            paths.append(f'<path class="{name}" d="{path}"/>' if path else "")
        # Stretched to the page's width: nothing in it has a shape that could be distorted.
        return f'<svg viewBox="0 0 1000 100" preserveAspectRatio="none">{"".join(paths)}</svg>'


def _axis(seconds: float) -> str:
    step = next((each for each in _TICKS if seconds / each <= _MOST_TICKS), seconds / _MOST_TICKS)
    # The last one needs room for its text.
    ticks = [at for at in np.arange(0, seconds, step) if not at or at / seconds < 0.97]
    marks = (f'<span style="left:{at / seconds:.2%}">{clock(at)}</span>' for at in ticks)
    return f'<div class="axis quiet">{"".join(marks)}</div>'


def _runs(heard: Classified) -> str:
    """What is said for how long: neighbouring windows with the same answer are one line."""
    edges = _edges(heard.timeline)
    runs: list[tuple[float, float, str, list[float]]] = []
    for left, right, segment in zip(edges, edges[1:], heard.timeline.segments):
        most = float(segment.probabilities.max())
        if segment.label is None:
            said = "(nothing can be heard)"
        else:
            said = segment.label if heard.is_enough(most) else "(not sure enough)"
        if runs and runs[-1][2] == said:
            runs[-1] = (runs[-1][0], right, said, [*runs[-1][3], most])
        else:
            runs.append((left, right, said, [most]))
    lines = []
    for left, right, said, shares in runs:
        mean = float(np.mean(shares))
        lines.append((f"{clock(left)} to {clock(right)}", said, f"{mean:.1%}" if mean == mean else ""))
    return _table(("time", "class", "probability"), lines)


def _transcribed(heard: Transcribed) -> Iterable[str]:
    transcript = heard.transcript
    said = text(transcript.text) if transcript.text else '<span class="quiet">No words were heard.</span>'
    yield f'<p class="said" id="answer-text">{said}</p>'
    if not transcript.complete:
        yield '<p class="quiet">It breaks off: the model came to its most tokens.</p>'
    yield f'<p class="quiet">{heard.seconds:.1f} seconds were heard.</p>'
    if transcript.segments:
        lines = [(f"{clock(s.start)} to {clock(s.end)}", s.text) for s in transcript.segments]
        yield f"<h2>Over time</h2>{_table(('time', 'text'), lines)}"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def row(cells: Iterable[str], kind: str) -> str:
        return f"<tr>{''.join(f'<{kind}>{text(cell)}</{kind}>' for cell in cells)}</tr>"

    body = "".join(row(line, "td") for line in lines[:_MOST_LINES])
    more = len(lines) - _MOST_LINES
    rest = f'<p class="quiet">and {more} more lines</p>' if more > 0 else ""
    return f'<table class="lines"><thead>{row(heads, "th")}</thead><tbody>{body}</tbody></table>{rest}'
