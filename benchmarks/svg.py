"""Pictures as SVG, written by hand: bars, dots, lines and text on a card.

The same numbers give the same bytes on every machine, so that a test can tell a stale figure, and the colours
follow the reader's light or dark setting.
"""

from html import escape

_STYLE = """
  text { font-family: system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; font-size: 13px }
  .card { fill: #ffffff; stroke: #d0d7de } .title { font-weight: 600; font-size: 14px }
  .title, .name { fill: #1f2328 } .note { fill: #59636e; font-size: 11px }
  .line { stroke: #1f2328; fill: none } .grid { stroke: #d0d7de; fill: none }
  .blue { fill: #0072b2 } .grey { fill: #8c959f } .orange { fill: #d55e00 } .green { fill: #009e73 }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #3d444d } .title, .name { fill: #f0f6fc } .note { fill: #9198a1 }
    .line { stroke: #f0f6fc } .grid { stroke: #3d444d }
    .blue { fill: #56b4e9 } .grey { fill: #848d97 } .orange { fill: #e69f00 } .green { fill: #2dba94 }
  }
"""
COLOURS = ("blue", "grey", "orange", "green")


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


class Picture:
    """A card of ``width`` times ``height`` pixels. Kinds are the classes of the style above."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self._parts: list[str] = []

    def text(self, x: float, y: float, text: str, kind: str = "name", anchor: str = "start") -> None:
        """A line of text whose baseline is at ``y``; ``anchor``: start, middle or end."""
        where = f'x="{_number(x)}" y="{_number(y)}" text-anchor="{anchor}"'
        self._parts.append(f'<text class="{kind}" {where}>{escape(text)}</text>')

    def bar(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        sides = f'width="{_number(width)}" height="{_number(height)}"'
        self._parts.append(f'<rect class="{kind}" x="{_number(x)}" y="{_number(y)}" {sides} rx="2"/>')

    def line(self, *points: tuple[float, float], kind: str = "line") -> None:
        places = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        self._parts.append(f'<polyline class="{kind}" points="{places}"/>')

    def dot(self, x: float, y: float, kind: str) -> None:
        self._parts.append(f'<circle class="{kind}" cx="{_number(x)}" cy="{_number(y)}" r="4"/>')

    def square(self, x: float, y: float, kind: str) -> None:
        self.bar(x - 3.5, y - 3.5, 7, 7, kind)

    def render(self, title: str, description: str) -> str:
        """The whole file. ``title`` and ``description`` are for those who cannot see it."""
        size = f'width="{self.width - 1}" height="{self.height - 1}"'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(description)}</desc>",
            f"<style>{_STYLE}</style>",
            f'<rect class="card" x="0.5" y="0.5" {size} rx="6"/>',
            *self._parts,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"
