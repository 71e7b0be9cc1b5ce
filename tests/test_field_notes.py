"""What fields mean, at run time."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc

import etr
from etr.field_notes import documented, field_notes


def test_help_of_the_layers_config_says_what_every_field_means() -> None:
    """Inherited fields too, in the words under them in the source."""
    shown = " ".join(pydoc.render_doc(etr.MoEConfig, renderer=pydoc.plaintext).split())
    notes = field_notes(etr.MoEConfig)
    for field in dataclasses.fields(etr.MoEConfig):
        assert notes[field.name] in shown.replace("| ", "")
    assert "One MoE layer: four sizes" in shown
    assert "top_k = 1 " in shown


def test_notes_are_read_when_asked_for_and_not_at_import() -> None:
    assert not isinstance(vars(etr.MoEConfig)["__doc__"], str)
    assert inspect.getdoc(etr.MoEConfig).startswith("One MoE layer")  # type: ignore[union-attr]


def test_a_class_without_source_has_no_notes() -> None:
    made = dataclasses.make_dataclass("Made", [("width", int), ("depth", int, 3)])
    assert field_notes(made) == {}
    assert documented(made).__doc__.splitlines()[-2:] == ["    width", "    depth = 3"]  # type: ignore[union-attr]
