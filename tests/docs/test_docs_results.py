"""What docs/results/README.md derives from the tables follows from them."""

from __future__ import annotations

from itertools import takewhile

from markdown_blocks import ROOT

from etr.moe.capacity import Schedule

RESULTS = ROOT / "docs/results"
SUMMARY = " ".join((RESULTS / "README.md").read_text(encoding="utf-8").split())
OWN = "2x2: 2 nodes of 2, own text"
PUBLISHED = "published ETR: schedule to 0.6, locality, chunked"
DEFAULT = "default ETR: schedule to 1.1, locality, chunked"
LM = "`lm`: language model (equal steps)"


def row(page: str, section: str, name: str) -> dict[str, str]:
    """A row of a section's first table, by the names of its columns."""
    text = (RESULTS / page).read_text(encoding="utf-8").partition(f"\n## {section}\n\n")[2]
    lines = takewhile(lambda line: line.startswith("|"), text.splitlines())
    head, _, *cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    (found,) = (one for one in cells if one[0].strip("`") == name)
    return dict(zip(head, found, strict=True))


def number(cell: str) -> float:
    return float(cell.split()[0])


def test_the_fair_baseline() -> None:
    steps = [
        number(row("cluster.md", OWN, name)["step (s)"])
        for name in ("overlap alone: baseline, unpadded, chunked", PUBLISHED, DEFAULT)
    ]
    published, default = (step / steps[0] for step in steps[1:])
    assert f"form takes {published:.2f}, and one of the default {default:.2f}." in SUMMARY


def test_the_means_over_the_schedule() -> None:
    sections = {
        "etr_paper": "`text-x`: parts (equal steps)",
        "etr": "`text-x`: headline (equal steps)",
    }
    said = {}
    for name, variant in (("etr_paper", PUBLISHED), ("etr", DEFAULT)):
        step = number(row("cluster.md", OWN, variant)["step / baseline"])
        kept = [row("quality.md", section, name) for section in (LM, sections[name])]
        shares = [float(one["kept in training"]) / float(one["kept served"]) for one in kept]
        said[name] = " to ".join(f"{step * share:.2f}" for share in shares)
    assert f"would take {said['etr_paper']} of the padded baseline's" in SUMMARY
    assert f"form and {said['etr']} for the default" in SUMMARY


def test_the_mean_of_the_published_capacity() -> None:
    plan = Schedule()
    moments = [plan.factor(plan.stage((step + 0.5) / 10_000)) for step in range(10_000)]
    mean = sum(moments) / len(moments)
    assert f"factor: {mean:.2f} on average, {plan.end_factor:.2f} at the end" in SUMMARY
    alone = row("cluster.md", OWN, "capacity alone: schedule to 0.6, padded")
    scaled = number(alone["step / baseline"]) * mean / plan.end_factor
    assert f"and {scaled:.2f} for the published capacity alone" in SUMMARY


def test_the_best_point_estimate_at_equal_flops() -> None:
    section = "`text-x`: controls, matched (equal expert FLOPs)"
    linear = row("quality.md", section, "linear-0.6")["less linear-1.1"]
    low, high = (f"{-float(bound):.3f}" for bound in linear.split("(")[1].strip(")").split(" to "))
    assert f"lower by {-number(linear):.3f} ({high} to {low})" in SUMMARY
