"""Seeded damage to files: of bytes, of JSON values, of the header of safetensors."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 10**400, 1.5, -0.0, 1e308),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "0",
        "../x",
        "/dev/zero",
        "\ud800",
        "a" * 5000,
        "[MASK]",
    ),
    *([], {}, [[]], [1, "a", None], {"a": {"b": [1]}}, ["x"] * 3),
)
"""What a JSON value is replaced by."""
HEADER = 8
"""Bytes of a safetensors file that hold the length of its header."""


def damage_bytes(content: bytes, stream: random.Random) -> bytes:
    """Flip, cut, double, blank, insert, move or replace bytes."""
    size = max(len(content), 1)
    start = stream.randrange(size)
    end = min(size, start + stream.choice((1, 2, 8, 64, size)))
    noise = stream.randbytes(stream.choice((1, 4, 32)))
    return stream.choice(
        (
            _flip(content, start, stream),
            content[:start],
            content[start:],
            content[:start] + content[end:],
            content[:start] + content[start:end] * 2 + content[end:],
            content[:start] + bytes(end - start) + content[end:],
            content[:start] + noise + content[start:],
            content[:start] + noise + content[end:],
            content[end:] + content[start:end] + content[:start],
            b"\xef\xbb\xbf" + content,
            content.decode("utf-8", "replace").encode("utf-16"),
            b"",
        )
    )


def damage_json(content: bytes, stream: random.Random) -> bytes:
    """Replace, remove, rename or repeat one of the values, or nest one far too deeply."""
    values = copy.deepcopy(json.loads(content))
    places = [*_places(values)]
    if not places:
        return json.dumps(stream.choice(VALUES)).encode()
    parent, key = stream.choice(places)
    match stream.randrange(8):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[stream.choice(("", "x", f"{key}x", key[:-1], key.upper()))] = parent.pop(key)
        case 2:
            other, there = stream.choice(places)
            parent[key] = copy.deepcopy(other[there]) if there in _keys(other) else None
        case 3:
            return json.dumps(stream.choice(VALUES)).encode()
        case 4:
            parent[key] = "MARK"
            return json.dumps(values).replace('"MARK"', "[" * 100_000, 1).encode()
        case _:
            parent[key] = copy.deepcopy(stream.choice(VALUES))
    return json.dumps(values).encode("utf-8", "surrogatepass")


def damage_lines(content: bytes, stream: random.Random) -> bytes:
    """Damage one line of a file of JSON lines: its bytes, its values, or its place."""
    lines = content.split(b"\n")
    place = stream.randrange(len(lines) - 1)
    if stream.random() < 0.3:
        return damage_bytes(content, stream)
    way = stream.choice((damage_bytes, damage_json, damage_json))
    line = way(lines[place], stream)
    return b"\n".join([*lines[:place], line, *lines[place + stream.randrange(2) :]])


def damage_header(content: bytes, stream: random.Random) -> bytes:
    """Damage what a safetensors file says about its tensors, and leave their values."""
    length = int.from_bytes(content[:HEADER], "little")
    header, values = content[HEADER : HEADER + length], content[HEADER + length :]
    if stream.random() < 0.3:
        return damage_bytes(content[: HEADER + length], stream) + values
    header = stream.choice((damage_json, damage_json, damage_bytes))(header, stream)
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(HEADER, "little") + header + values


def damage_json_or_bytes(content: bytes, stream: random.Random) -> bytes:
    """One or the other."""
    return stream.choice((damage_json, damage_json, damage_bytes))(content, stream)


def _flip(content: bytes, place: int, stream: random.Random) -> bytes:
    if not content:
        return b"\0"
    return (
        content[:place] + bytes([content[place] ^ 1 << stream.randrange(8)]) + content[place + 1 :]
    )


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every value inside, as its parent and its key."""
    found = []
    for key in _keys(value):
        found += [(value, key), *_places(value[key])]
    return found


def _keys(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value)
    return list(range(len(value))) if isinstance(value, list) else []
