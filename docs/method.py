"""Draw the method as one picture: `python docs/method.py` writes docs/method.svg, the same bytes each time.

Twelve neurons of one block go through all five panels with their own colour, so that the picture is a small example
and not an ornament: the ranks of panel 2 make the modules of panel 3, and the thresholds of panel 4 keep six of twelve.
Only the widths of panel 5 are made up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

WIDTH, HEIGHT, PANEL = 1060, 336, 196
INK, SOFT, FAINT, PAPER, GONE = "#1f2933", "#55616d", "#cfd6dd", "#fafbfc", "#93a0ad"
BLUE, GREEN, RED = COLOURS = ("#0072B2", "#009E73", "#D55E00")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, 'DejaVu Sans', sans-serif"
CORPORA = ("wiki", "web", "code")
# Ranks (1 is the most important) of twelve neurons on the three corpora, module by module.
RANKS = {
    BLUE: [(1, 1, 2), (2, 3, 1), (5, 4, 5), (8, 9, 8), (11, 11, 12)],
    GREEN: [(3, 2, 4), (4, 6, 6), (9, 8, 10), (12, 12, 11)],
    RED: [(6, 10, 3), (7, 5, 9), (10, 7, 7)],
}
KEPT = {BLUE: 3, GREEN: 2, RED: 1}  # six of twelve
BLOCKS = (0.74, 0.58, 0.46, 0.36, 0.34, 0.4, 0.5, 0.44, 0.68)  # what blocks keep: half of it all
assert abs(sum(BLOCKS) / len(BLOCKS) - 0.5) < 1e-9
assert sum(KEPT.values()) == 6


def text(x: float, y: float, content: str, *, size: float = 12, colour: str = SOFT, **attributes: object) -> str:
    """One line of text, centred unless `anchor` says otherwise."""
    more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    anchor = "" if "text_anchor" in attributes else ' text-anchor="middle"'
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}"{anchor}{more}>{content}</text>'


def dot(x: float, y: float, colour: str, *, kept: bool = True, r: float = 5) -> str:
    """A neuron; hollow where it goes."""
    if kept:
        return f'<circle cx="{x:g}" cy="{y:g}" r="{r:g}" fill="{colour}"/>'
    return f'<circle cx="{x:g}" cy="{y:g}" r="{r - 0.75:g}" fill="{PAPER}" stroke="{GONE}" stroke-width="1.5"/>'


def corpora(x: float) -> Iterator[str]:
    """Three pages; the first one, which gives the scores, stands out."""
    lines = ((38, 44, 40, 24), (44, 30, 42, 36), (26, 34, 20, 30))
    for i, (name, widths) in enumerate(zip(CORPORA, lines, strict=True)):
        left, top = x + 34 + 12 * i, 74 + 61 * i
        edge = INK if i == 0 else SOFT
        yield (
            f'<path d="M{left} {top}h58l14 14v38h-72z" fill="#ffffff" stroke="{edge}" stroke-width="1.5" '
            f'stroke-linejoin="round"/><path d="M{left + 58} {top}v14h14" fill="none" stroke="{edge}" '
            f'stroke-width="1.5" stroke-linejoin="round"/>'
        )
        for j, width in enumerate(widths):
            indent = (0, 8, 16, 8)[j] if name == "code" else 0
            y = top + 12 + 9.5 * j
            line = f'd="M{left + 9 + indent} {y}h{width}" stroke="{FAINT}" stroke-width="3.5" stroke-linecap="round"'
            yield f"<path {line}/>"
        yield text(left + 83, top + 31, name, size=13, colour=INK, text_anchor="start")


def ranks(x: float) -> Iterator[str]:
    """A line per neuron through its ranks on the three corpora."""
    columns = [x + 34 + 64 * i for i in range(3)]
    for place, name in zip(columns, CORPORA, strict=True):
        yield f'<path d="M{place} 76V240" stroke="{FAINT}" stroke-width="1"/>'
        yield text(place, 257, name, size=12)
    for colour, neurons in RANKS.items():
        for places in neurons:
            (x0, y0), (x1, y1), (x2, y2) = points = [(c, 68 + 14 * r) for c, r in zip(columns, places, strict=True)]
            yield (
                f'<path d="M{x0} {y0}C{x0 + 30} {y0} {x1 - 30} {y1} {x1} {y1}S{x2 - 30} {y2} {x2} {y2}" fill="none" '
                f'stroke="{colour}" stroke-width="{2.4 if colour == RED else 1.8}" stroke-opacity="0.85"/>'
            )
            yield from (dot(*point, colour, r=4) for point in points)


def modules(x: float) -> Iterator[str]:
    """The neurons in their modules. One module is sensitive and weak, and ranks by weights alone."""
    clusters = {
        BLUE: ((54, 112, 46, 38), ((-20, -10), (4, -18), (22, 0), (-8, 10), (12, 18))),
        GREEN: ((146, 134, 40, 36), ((-14, -10), (12, -12), (-10, 12), (14, 10))),
        RED: ((84, 205, 50, 30), ((-20, 2), (2, -8), (20, 6))),
    }
    for colour, ((cx, cy, rx, ry), places) in clusters.items():
        dashes = ' stroke-dasharray="5 4"' if colour == RED else ""
        yield (
            f'<ellipse cx="{x + cx}" cy="{cy}" rx="{rx}" ry="{ry}" fill="{colour}" fill-opacity="0.09" '
            f'stroke="{colour}" stroke-width="1.6"{dashes}/>'
        )
        yield from (dot(x + cx + dx, cy + dy, colour) for dx, dy in places)
    yield text(x + 98, 257, "drifts and is weak: by weights", size=12, colour=RED)


def thresholds(x: float) -> Iterator[str]:
    """Each module's neurons by rank, with its own threshold."""
    top, bottom = 84, 232
    yield f'<path d="M{x + 32} {bottom}V{top - 12}m-4 7l4 -7l4 7" fill="none" stroke="{SOFT}" stroke-width="1.2"/>'
    middle = (top + bottom) / 2
    yield text(x + 22, middle, "rank in module", size=11, transform=f"rotate(-90 {x + 22:g} {middle:g})")
    for column, (colour, neurons) in enumerate(RANKS.items()):
        place, count = x + 64 + 48 * column, len(neurons)
        heights = [top + (bottom - top) * (i + 0.5) / count for i in range(count)]
        cut = (heights[KEPT[colour] - 1] + heights[KEPT[colour]]) / 2
        yield f'<path d="M{place} {top - 4}V{bottom + 2}" stroke="{FAINT}" stroke-width="1"/>'
        yield from (dot(place, y, colour, kept=i < KEPT[colour], r=6) for i, y in enumerate(heights))
        yield (
            f'<path d="M{place - 18} {cut:g}h36" stroke="{INK}" stroke-width="2.4" stroke-linecap="round"/>'
            f'<path d="M{place + 24} {cut:g}m-4 -4l4.5 -6l4.5 6zm0 8l4.5 6l4.5 -6z" fill="{SOFT}"/>'
        )
    yield text(x + 108, 257, "6 of 12 stay", size=12)


def smaller(x: float) -> Iterator[str]:
    """Widths of the blocks, before and after."""
    for i, share in enumerate(BLOCKS):
        y, full = 80 + 18 * i, 150
        bar = f'<rect x="{x + 24}" y="{y}" height="12" rx="3"'
        yield f'{bar} width="{full}" fill="none" stroke="{GONE}" stroke-width="1.2"/>'
        yield f'{bar} width="{full * share:g}" fill="{INK}" fill-opacity="0.82"/>'
    yield text(x + 99, 257, "each block its own width", size=12)


STEPS = (
    ("Corpora", corpora, ("One corpus gives the scores,", "all show how ranks move.")),
    ("Ranks disagree", ranks, ("The same neurons rank", "differently on other text.")),
    ("Modules", modules, ("Neurons that behave alike", "compete inside a module.")),
    ("Thresholds", thresholds, ("One per module, learned around", "the frozen model, budget exact.")),
    ("Smaller model", smaller, ("Sliced, reloaded, and judged", "on text never seen.")),
)


def picture(steps: Sequence[tuple] = STEPS) -> str:
    """The whole SVG. It brings its own paper, so that it reads the same on light and on dark pages."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-labelledby="title" font-family="{FONT}">',
        '<title id="title">gprune: corpora, ranks that disagree, modules, thresholds, a smaller model</title>',
        f'<rect x="0.75" y="0.75" width="{WIDTH - 1.5}" height="{HEIGHT - 1.5}" rx="14" fill="{PAPER}" '
        f'stroke="{FAINT}" stroke-width="1.5"/>',
    ]
    gap = (WIDTH - len(steps) * PANEL) / (len(steps) + 1)
    for i, (title, draw, caption) in enumerate(steps):
        x = gap + i * (PANEL + gap)
        parts.append(text(x + PANEL / 2, 40, f"{i + 1}  {title}", size=17, colour=INK, font_weight=600))
        parts += draw(x)
        parts += [text(x + PANEL / 2, 292 + 18 * j, line, size=12.5) for j, line in enumerate(caption)]
        if i:
            left = x - gap / 2
            parts.append(
                f'<path d="M{left - 6:g} 160l10 9l-10 9" fill="none" stroke="{SOFT}" stroke-width="2.4" '
                f'stroke-linecap="round" stroke-linejoin="round"/>'
            )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture(), encoding="utf-8")
