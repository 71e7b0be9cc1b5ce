"""Made-up text, the same on every machine, for a built-in domain whose source is missing."""

from __future__ import annotations

import random
from collections.abc import Callable
from decimal import Context, Decimal

_NOUNS = "index buffer window signal matrix token carrier packet kernel vector lattice filter"
_VERBS = "scale merge shift count reduce sample encode route balance project align trim"
_ADJECTIVES = "sparse dense local global stable narrow shared empty ordered recent finite"

_Synth = Callable[[random.Random], str]


def synthesise(domain: str, num_bytes: int, seed: int = 0) -> list[str]:
    """Documents in the spirit of a built-in domain.

    Args:
        domain: a built-in domain's name; others get English sentences.
        num_bytes: least size of all documents together, bytes; all text is ASCII.
        seed: same seed, same text.
    """
    make, repeats = _MAKERS.get(domain, (_english, 8))
    rng = random.Random(f"{domain}-{seed}")
    documents: list[str] = []
    while num_bytes > 0:
        documents.append("\n".join(make(rng) for _ in range(repeats)) + "\n")
        num_bytes -= len(documents[-1])
    return documents


def _words(rng: random.Random) -> tuple[str, str, str, int]:
    verb, adjective, noun = (rng.choice(kind.split()) for kind in (_VERBS, _ADJECTIVES, _NOUNS))
    return verb, adjective, noun, rng.randrange(2, 1000)


def _python(rng: random.Random) -> str:
    verb, adjective, noun, n = _words(rng)
    other, operator = rng.choice(_NOUNS.split()), rng.choice("+-*%")
    return (
        f"def {verb}_{adjective}_{noun}({noun}s, {other}={n}):\n"
        f"    result = []\n"
        f"    for item in {noun}s:\n"
        f"        if item > {rng.randrange(n)}:\n"
        f"            result.append(item {operator} {other})\n"
        f"    return result\n"
    )


def _cpp(rng: random.Random) -> str:
    verb, adjective, noun, n = _words(rng)
    kind = rng.choice(["int64_t", "float", "double", "uint8_t"])
    member = f"{rng.choice(_NOUNS.split())}{rng.randrange(n)}_"
    return (
        f"template <typename {noun.title()}>\nclass {adjective.title()}{n} {{\n public:\n"
        f"  {kind} {verb}{rng.randrange(n)}(const {noun.title()}& {noun}) const {{\n"
        f"    return {noun}.size() * {rng.randrange(n)} + {member};\n  }}\n"
        f" private:\n  {kind} {member} = {rng.randrange(n)};\n}};\n"
    )


def _docs(rng: random.Random) -> str:
    verb, adjective, noun, n = _words(rng)
    other = rng.choice(_NOUNS.split())
    a, b, c = (rng.randrange(2, 10**5) for _ in range(3))
    return (
        f"{verb.title()} the {adjective} {noun} by {a}.\n\n"
        f"Args:\n    {noun}: a tensor of {b} {other}s.\n"
        f"    {other}: at most {c}. Default: {rng.randrange(n)}\n\n"
        f"Returns:\n    The {other} of length {a + b}, or {c}.\n"
    )


def _math(rng: random.Random) -> str:
    a, b, c, d = (rng.randrange(1, 60) for _ in range(4))
    return (
        f">>> expand(({a}*x + {b})*({c}*x + {d}))\n"
        f"{a * c}*x**2 + {a * d + b * c}*x + {b * d}\n"
        f">>> diff({a}*x**{b}, x)\n{a * b}*x**{b - 1}\n"
    )


def _arithmetic(rng: random.Random) -> str:
    precision = rng.choice([9, 16, 34])
    context = Context(prec=precision)
    name, apply = rng.choice(
        [("add", context.add), ("subtract", context.subtract), ("multiply", context.multiply)]
    )
    left, right = (
        Decimal(rng.randrange(-(10**8), 10**8)).scaleb(-rng.randrange(9)) for _ in range(2)
    )
    test = f"{name[:3]}{rng.randrange(10**5):05d}"
    return f"{test} {name} '{left}' '{right}' -> '{apply(left, right)}'"


def _english(rng: random.Random) -> str:
    sentences = []
    for _ in range(rng.randrange(3, 7)):
        verb, adjective, noun, n = _words(rng)
        other = rng.choice(_NOUNS.split())
        sentences.append(
            rng.choice(
                [
                    f"You may {verb} the {adjective} {noun} after {n} days.",
                    f"When a {noun} is {adjective}, the {other} will {verb} it {n} times.",
                    f"Neither the {noun} nor the {adjective} {other} should {verb} part {n}.",
                    f"Section {n} says how to {verb} every {adjective} {noun}.",
                ]
            )
        )
    return " ".join(sentences) + "\n"


_MAKERS: dict[str, tuple[_Synth, int]] = {
    "python": (_python, 12),
    "cpp": (_cpp, 12),
    "docs": (_docs, 8),
    "math": (_math, 16),
    "arithmetic": (_arithmetic, 64),
    "english": (_english, 8),
}
