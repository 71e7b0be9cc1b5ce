"""Text in the colours of the experts that took its tokens; what nobody took is struck out."""

from collections.abc import Iterator, Sequence
from colorsys import hls_to_rgb
from html import escape

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from etr.report.figure import new_figure
from etr.report.matrices import Found
from etr.report.results import Results
from etr.report.routed import Piece, Routed, RoutedText, hue, read_routed
from etr.report.spec import Missing, Numbers, Plot, Spec
from etr.report.style import INK, SOFT
from etr.report.wording import clipped

MOST_RUNS = 4
LINE = 62
MOST_LINES = 4


def _draw(results: Results) -> Plot | Missing:
    found, problems = _read(results)
    if not found:
        return Missing(
            reason=problems[0] if problems else "no run has a trace.parquet of routed tokens"
        )
    without = f" Not shown: {'; '.join(problems)}." if problems else ""
    return Plot(
        figure=_picture(found),
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
    for index, name in enumerate(results.names):
        for row in results.of(name):
            if row.trace is None:
                continue
            try:
                routed = read_routed(row.trace)
            except ValueError as error:
                problems.append(f"{name}, {error}")
                continue
            found.append(Found(index=index, name=name, row=row, value=routed))
            break
    if len(found) > MOST_RUNS:
        problems.append(f"{len(found) - MOST_RUNS} more variants")
    return found[:MOST_RUNS], problems


def _html(run: Found[Routed]) -> str:
    routed = run.value
    legend = "".join(
        _span(Piece(text=f"expert {expert}", expert=expert, kept=True), routed.num_experts)
        for expert in range(min(routed.num_experts, 16))
    )
    more = " …" if routed.num_experts > 16 else ""
    layers = sorted({text.layer for text in routed.texts})
    blocks = "".join(
        f"<details{' open' if layer == layers[-1] else ''}><summary>MoE layer {layer} of"
        f" {routed.num_layers}, counted from 0</summary>"
        + "".join(_text_html(text, routed) for text in routed.texts if text.layer == layer)
        + "</details>"
        for layer in reversed(layers)
    )
    return (
        f'<div class="routed"><h4>{escape(run.name)}, {escape(routed.selection)} selection</h4>'
        f'<p class="tokens">{legend}{more} <s>dropped</s></p>{blocks}</div>'
    )


def _text_html(text: RoutedText, routed: Routed) -> str:
    spans = "".join(_span(piece, routed.num_experts) for piece in text.pieces)
    return f'<p class="domain">{escape(text.domain)}</p><p class="tokens">{spans}</p>'


def _span(piece: Piece, num_experts: int) -> str:
    text = escape("".join(c if c.isprintable() or c == "\n" else "·" for c in piece.text))
    if not piece.kept:
        wanted = "" if piece.expert is None else f", wanted expert {piece.expert}"
        return f'<s title="dropped{wanted}">{text}</s>'
    shade = hue(piece.expert or 0, num_experts)
    return f'<span title="expert {piece.expert}" style="--hue:{shade}">{text}</span>'


def _picture(found: Sequence[Found[Routed]]) -> Figure:
    """The last layer's first text of every run, as lines of fixed width."""
    figure = new_figure(len(found), 1, height=0.2 + (0.35 + 0.17 * MOST_LINES) * len(found))
    for axes, run in zip(figure.axes, found, strict=True):
        last = max(text.layer for text in run.value.texts)
        text = next(text for text in run.value.texts if text.layer == last)
        _draw_text(axes, text.pieces, run.value.num_experts)
        axes.set_title(
            clipped(f"{run.name}, layer {last}, {text.domain}", 60),
            fontsize=8.5,
            color=SOFT.light,
            pad=4,
        )
    return figure


def _draw_text(axes: Axes, pieces: Sequence[Piece], num_experts: int) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, LINE)
    axes.set_ylim(MOST_LINES, 0)
    for piece, line, column, part in _lines(pieces):
        middle, width = line + 0.5, len(part)
        if piece.kept:
            color = hls_to_rgb(hue(piece.expert or 0, num_experts) / 360, 0.84, 0.7)
            axes.barh(middle, width, left=column, height=0.92, color=color, linewidth=0)
        else:
            axes.plot([column, column + width], [middle] * 2, color=SOFT.light, linewidth=0.7)
        for place, letter in enumerate(part):
            # One by one: another font's letters would be of another width.
            axes.text(
                column + place + 0.5,
                middle,
                letter,
                ha="center",
                va="center",
                fontsize=7.5,
                family="DejaVu Sans Mono",
                color=INK.light if piece.kept else SOFT.light,
            )


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


SPEC = Spec(
    key="routed-text",
    title="Which expert takes which token",
    section="Text",
    draw=_draw,
)
