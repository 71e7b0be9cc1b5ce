"""Text in the colours of the experts that took its tokens; what nobody took is struck out."""

from collections.abc import Iterator, Sequence
from colorsys import hls_to_rgb
from html import escape

from etr.report.found import Found
from etr.report.marks import HIDDEN, SHOWN, layer, mark, nominal
from etr.report.results import Results
from etr.report.routed import Piece, Routed, RoutedText, read_routed, turn
from etr.report.spec import Chart, Missing, Numbers, Plot, Spec
from etr.report.style import CARD, INK, SANS, SOFT
from etr.report.wording import clipped

MOST_RUNS = 4
LINE = 62
MOST_LINES = 4


def _draw(results: Results) -> Plot | Missing:
    found, problems = _read(results)
    if not found:
        return Missing(problems[0] if problems else "no run has a trace.parquet of routed tokens")
    without = f" Not shown: {'; '.join(problems)}." if problems else ""
    return Plot(
        chart=_picture(found),
        wide=True,
        caption="Held-out text, each token in the colour of the best expert that kept it. Struck"
        " out: tokens that no expert kept. The start of one text per domain, at the first and the"
        " last MoE layer; experts of different layers and runs have nothing in common. First trace"
        f" of each variant.{without}",
        numbers=Numbers(
            columns=("run", "layer", "domain", "place", "text", "expert", "kept"),
            rows=[
                (run.name, text.layer, text.domain, place, piece.text, piece.expert, piece.kept)
                for run in found
                for text in run.value.texts
                for place, piece in enumerate(text.pieces)
            ],
        ),
        html="".join(_html(run) for run in found),
    )


def _read(results: Results) -> tuple[list[Found[Routed]], list[str]]:
    """The first readable trace of each variant, and what is wrong with the others."""
    found: list[Found[Routed]] = []
    problems: list[str] = []
    for name in results.names:
        for row in results.of(name):
            if row.trace is None:
                continue
            try:
                routed = read_routed(row.trace)
            except ValueError as error:
                problems.append(f"{name}, {error}")
                continue
            found.append(Found(name=name, row=row, value=routed))
            break
    if len(found) > MOST_RUNS:
        problems.append(f"{len(found) - MOST_RUNS} more variants")
    return found[:MOST_RUNS], problems


def _html(run: Found[Routed]) -> str:
    routed = run.value
    legend = "".join(
        _tag(Piece(text=f"expert {expert}", expert=expert, kept=True))
        for expert in range(min(routed.num_experts, 16))
    )
    more = " …" if routed.num_experts > 16 else ""
    layers = sorted({text.layer for text in routed.texts})
    blocks = "".join(
        f"<details{' open' if layer == layers[-1] else ''}><summary>MoE layer {layer} of"
        f" {routed.num_layers}, counted from 0</summary>"
        + "".join(_text_html(text) for text in routed.texts if text.layer == layer)
        + "</details>"
        for layer in reversed(layers)
    )
    return (
        f'<div class="routed" data-variant="{escape(run.name)}"'
        f' style="--turn:{turn(routed.num_experts):g}">'
        f"<h4>{escape(run.name)}, {escape(routed.selection)} selection</h4>"
        f'<p class="tokens">{legend}{more} <s>dropped</s></p>{blocks}</div>'
    )


def _text_html(text: RoutedText) -> str:
    tags = "".join(_tag(piece) for piece in text.pieces)
    return f'<p class="domain">{escape(text.domain)}</p><p class="tokens">{tags}</p>'


def _tag(piece: Piece) -> str:
    """A page has thousands: the style makes colour and hover text of the expert alone."""
    text = escape("".join(c if c.isprintable() or c == "\n" else "·" for c in piece.text))
    name, expert = "i" if piece.kept else "s", piece.expert
    return f"<{name}{'' if expert is None else f' style=--e:{expert}'}>{text}</{name}>"


def _picture(found: Sequence[Found[Routed]]) -> Chart:
    """The last layer's first text of every run, as lines of fixed width."""
    heads: list[dict[str, object]] = []
    letters: list[dict[str, object]] = []
    for place, run in enumerate(found):
        last = max(text.layer for text in run.value.texts)
        text = next(text for text in run.value.texts if text.layer == last)
        top = place * (MOST_LINES + 2)
        name = clipped(f"{run.name}, layer {last}, {text.domain}", 70)
        heads.append({"variant": run.name, "x": 0, "row": top, "name": name})
        for piece, line, column, part in _lines(text.pieces):
            hue = turn(run.value.num_experts) * (piece.expert or 0) % 360
            red, green, blue = hls_to_rgb(hue / 360, 0.84, 0.7)
            color = f"rgb({255 * red:.0f},{255 * green:.0f},{255 * blue:.0f})"
            letters += [
                {
                    "variant": run.name,
                    "x": column + at,
                    "row": top + line + 1,
                    "letter": letter,
                    "color": color if piece.kept else CARD.css,
                    "kept": piece.kept,
                }
                for at, letter in enumerate(part)
            ]
    rows = len(found) * (MOST_LINES + 2)
    y = {"field": "row", "type": "quantitative", "axis": None, "scale": {"domain": [rows, 0]}}
    x = {"field": "x", "type": "quantitative", "axis": None, "scale": {"domain": [0, LINE]}}
    end = {"field": "x1"}
    own = {"field": "color", "type": "nominal", "scale": None}
    ink = {"condition": {"test": "datum.kept", "value": INK.light}, "value": SOFT.css}
    look = {"align": "left", "baseline": "top", "fontSize": 11}
    mono = mark("text", font="DejaVu Sans Mono, monospace", dy=3, **look)
    small = mark("text", font=SANS, color=SOFT.css, **look)
    return {
        "data": {"values": letters},
        "params": [HIDDEN],
        "height": 17 * rows,
        "transform": [
            SHOWN,
            {"calculate": "datum.x + 1.03", "as": "x1"},
            {"calculate": "datum.row + 0.94", "as": "row1"},
            {"calculate": "datum.row + 0.5", "as": "middle"},
        ],
        "layer": [
            layer(mark("rect"), x=x, y=y, x2=end, y2={"field": "row1"}, color=own),
            layer(mono, x=x, y=y, text=nominal("letter"), color=ink),
            {
                "transform": [{"filter": "!datum.kept"}],
                **layer(mark("rule", color=SOFT.css), x=x, x2=end, y=y | {"field": "middle"}),
            },
            {"data": {"values": heads}, **layer(small, x=x, y=y, text=nominal("name"))},
        ],
    }


def _lines(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, int, int, str]]:
    """The first lines of fixed width: pieces cut at their ends, with line and column."""
    place = 0
    for piece in pieces:
        rest = "".join(c if c.isprintable() else "¶" if c == "\n" else "·" for c in piece.text)
        while rest:
            line, column = divmod(place, LINE)
            if line >= MOST_LINES:
                return
            part, rest = rest[: LINE - column], rest[LINE - column :]
            place += len(part)
            yield piece, line, column, part


SPEC = Spec("routed-text", "Which expert takes which token", "Text", _draw)
