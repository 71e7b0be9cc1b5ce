"""Pictures in few letters: what a page or a file holds of what Vega drew."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from functools import partial

import numpy as np

_NEEDLESS = re.compile(
    r' (?:aria-\w+|role|pointer-events|class)="[^"]*"'
    r'| (?:opacity="1"|stroke-width="[01]"|stroke-miterlimit="10"|transform="translate\(0,0\)"'
    r'|[xy]2="0"|text-anchor="start"|font-weight="normal"|font-size="11px"'
    r'|stroke-dasharray="1,0")'
)
_UNSEEN = re.compile(
    r'<path d="[^"]*"(?: display="none")?/>(?!</clipPath>)'
    r'|<(line|text)[^>]* opacity="0"[^>]*(?:/>|>[^<]*</\1>)'
)
_LINE = re.compile(r'(?<= d=")(?:[ML]-?[\d.]+,-?[\d.]+){2,}(?=Z?")')
_PLACED = re.compile(
    r'(<text[^>]*) transform="translate\(([^,)]*),([^,)]*)\)"(?=[^>]*>[^<]*</text>)'
)
_SOFT = re.compile(r'(<text[^>]*) fill="var\(--soft\)"')
_CELL = r'<path d="M([-\d.]+),([-\d.]+)h([-\d.]+)v([-\d.]+)h[-\d.]+Z" fill="#(\w{6})"/>'
_CELLS = re.compile(f"(?:{_CELL}){{9,}}")


def slim(svg: str, step: int = 8) -> str:
    """The same picture in fewer letters: nothing unseen, short numbers, lines as steps, cells by
    their colour.

    Args:
        svg: what Vega drew.
        step: that parts of mixed colours are rounded to, of 256.
    """
    return _CELLS.sub(_by_colour, _shortened(svg, step))


def page_slim(svg: str) -> str:
    """The same inside a page, whose style colours texts, and where cells may be an image."""
    svg = _SOFT.sub(r"\1", _CELLS.sub(_as_image, _shortened(svg)))
    return re.sub(r' (?:xmlns(?::xlink)?|version|font-family)="[^"]*"(?=[^<>]*>)', "", svg)


def _shortened(svg: str, step: int = 8) -> str:
    kept: list[bool] = []

    def short(match: re.Match[str]) -> str:
        tag = _NEEDLESS.sub("", match.group())
        if tag.startswith("<g") and tag.endswith("/>"):
            return ""
        if tag.startswith("<g"):
            kept.append(tag != "<g>")
        if (tag == "<g>" and not kept[-1]) or (tag == "</g>" and not kept.pop()):
            return ""
        tag = re.sub(r"\d+\.\d+", lambda number: f"{round(float(number[0]), 2):g}", tag)
        tag = _LINE.sub(_steps, tag).replace("<svg", '<svg font-size="11px"')
        return re.sub(r"rgb\((\d+), (\d+), (\d+)\)", partial(_hex, step), tag)

    # Tags only: what a name says is left alone.
    svg = _UNSEEN.sub("", re.sub(r"<[^>]+>", short, svg))
    return _PLACED.sub(r'\1 x="\2" y="\3"', svg)


def _steps(line: re.Match[str]) -> str:
    """A path of straight lines, each from where the last one ended, in tenths of a pixel; flat
    stretches and those that go nowhere are one step."""
    steps: list[tuple[str, int, int]] = []
    at = 0, 0
    for letter, *point in re.findall(r"([ML])([^,]+),([^ML]+)", line[0]):
        x, y = (round(10 * float(number)) for number in point)
        step = ("M", x, y) if letter == "M" else ("l", x - at[0], y - at[1])
        at = x, y
        if step == ("l", 0, 0):
            continue
        flat = step[0] == "l" == steps[-1][0] and step[2] == 0 == steps[-1][2]
        if flat and (step[1] > 0) == (steps[-1][1] > 0):
            step = "l", step[1] + steps.pop()[1], 0
        steps.append(step)
    parts, before = [], ""
    for letter, x, y in steps:
        parts.append(f"{letter if letter != before else ' '}{x / 10:g},{y / 10:g}")
        before = letter
    return re.sub(r"[ ,](?=-)", "", re.sub(r"(?<!\d)0(?=\.)", "", "".join(parts)))


def _by_colour(cells: re.Match[str]) -> str:
    """One path for all cells of a colour and a height, as thick lines; they do not overlap."""
    paths: dict[tuple[str, str], str] = {}
    for x, y, width, height, colour in re.findall(_CELL, cells[0]):
        middle = float(y) + float(height) / 2
        key = colour, height
        paths[key] = paths.get(key, "") + f"M{x},{middle:g}h{width}"
    return "".join(
        f'<path d="{path}" stroke="#{colour}" stroke-width="{height}"/>'
        for (colour, height), path in paths.items()
    )


def _as_image(cells: re.Match[str]) -> str:
    """One image with a pixel for each cell, where they fill a grid."""
    found = re.findall(_CELL, cells[0])
    place = np.array([[float(number) for number in cell[:4]] for cell in found])
    columns, rows = (np.unique(place[:, axis]) for axis in (0, 1))
    width, height = place[0, 2:]
    whole = len(found) == len(columns) * len(rows) and all(
        np.abs(starts - (starts[0] + size * np.arange(len(starts)))).max() < 0.5
        for starts, size in ((columns, width), (rows, height))
    )
    if not whole:
        return _by_colour(cells)
    pixels = np.empty((len(rows), len(columns), 3), np.uint8)
    colours = [list(bytes.fromhex(cell[4])) for cell in found]
    pixels[np.searchsorted(rows, place[:, 1]), np.searchsorted(columns, place[:, 0])] = colours
    right, bottom = columns[-1] + width, rows[-1] + height
    return (
        f'<image x="{columns[0]:g}" y="{rows[0]:g}" width="{right - columns[0]:g}"'
        f' height="{bottom - rows[0]:g}" preserveAspectRatio="none"'
        ' style="image-rendering:pixelated"'
        f' href="data:image/png;base64,{base64.b64encode(_png(pixels)).decode()}"/>'
    )


def _png(pixels: np.ndarray) -> bytes:
    """Red, green and blue of each pixel, [H, W, 3], as a PNG file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def _hex(step: int, colour: re.Match[str]) -> str:
    """Of cells: with steps of 8, a few dozen colours that differ to the eye."""
    parts = (min(255, step * round(int(part) / step)) for part in colour.groups())
    return "#" + "".join(f"{part:02x}" for part in parts)
