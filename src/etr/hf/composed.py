"""Folders of several language models that answer as one, and generating with them.

A folder holds ``composition.json`` (which composition, and how many members), what it learned in
``learned.safetensors``, and the members as model folders ``member-0``, ``member-1``, ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from etr.files import read_object, whole_folder, write_json
from etr.hf.convert import write_model
from etr.hf.decode import generate
from etr.hf.loading import load_pretrained
from etr.hf.modeling import EtrForCausalLM
from etr.methods import told_to_import
from etr.model import COMPOSITIONS, Composition, Decoding
from etr.model.composition import Learned, PromptComposition
from etr.pretrained import check_links
from etr.table import config_to_dict

RECORD, LEARNED = "composition.json", "learned.safetensors"
FORMAT = 1


class Composed(nn.Module):
    """Several language models that answer as one, in eval mode.

    Args:
        composition: how.
        members: of one vocabulary.
        learned: what `composition` learned of them.
    Raises:
        ValueError: the vocabularies differ, or what was learned is not of these members.
    """

    def __init__(
        self, composition: Composition, members: Sequence[EtrForCausalLM], learned: Learned
    ) -> None:
        super().__init__()
        vocabularies = {member.config.vocab_size for member in members}
        if len(vocabularies) != 1:
            raise ValueError(
                f"members have vocabularies of {sorted(vocabularies)} tokens; one only"
            )
        composition.check(learned, len(members), *vocabularies)
        self.composition, self.learned = composition, learned
        self.members = nn.ModuleList(members)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Of the members."""
        device: torch.device = self.members[0].device  # type: ignore[assignment]
        return device

    def answering(self, ids: Tensor, attention_mask: Tensor) -> Tensor | None:
        """Who answers each prompt, int64 [B]; None where all of them do."""
        if not isinstance(self.composition, PromptComposition):
            return None
        return self.composition.choose(self.learned, ids.cpu(), attention_mask.cpu().bool())

    def decode(
        self, decoding: Decoding, ids: Tensor, *, attention_mask: Tensor, **options: Any
    ) -> Tensor:
        """Continue prompts; each by its member alone, as that one does by itself.

        Args:
            decoding: of the member.
            ids, attention_mask: prompts, [B, S], padded on the left.
            options: of transformers' ``generate``.
        Returns:
            Prompts and what follows, [B * sequences, S']; behind shorter ones, padding.
        Raises:
            ValueError: an option that returns more than tokens.
        """
        if options.get("return_dict_in_generate"):
            raise ValueError("return_dict_in_generate is for one model; ask the member itself")
        chosen = self.answering(ids, attention_mask)
        assert chosen is not None
        parts, places = [], []
        for number in chosen.unique().tolist():
            rows = (chosen == number).nonzero()[:, 0].to(ids.device)
            mask = attention_mask[rows]
            parts.append(
                generate(self.members[number], decoding, ids[rows], attention_mask=mask, **options)
            )
            each = len(parts[-1]) // len(rows)
            places.append((rows[:, None] * each + torch.arange(each, device=ids.device)).flatten())
        if len(parts) == 1:
            return parts[0]
        length = max(part.shape[1] for part in parts)
        found = ids.new_full((sum(map(len, parts)), length), _padding(self.members[0], options))
        for part, place in zip(parts, places, strict=True):
            found[place, : part.shape[1]] = part
        return found


def _padding(member: Any, options: Mapping[str, Any]) -> int:
    """What stands behind a text that has ended."""
    known = (options, vars(member.generation_config))
    names = ("pad_token_id", "eos_token_id")
    found = next((v for name in names for k in known if (v := k.get(name)) is not None), 0)
    return int(found[0] if isinstance(found, list) else found)


def is_composed(folder: str | Path) -> bool:
    """Whether a folder holds a composed model."""
    return (Path(folder) / RECORD).is_file()


def write_composed(
    target: Path,
    composition: Composition,
    sources: Sequence[Path],
    learned: Learned,
    record: Mapping[str, Any],
    load: Callable[[Path], EtrForCausalLM] = load_pretrained,
) -> None:
    """Write a composed model, whole or not at all; one member at a time is in memory.

    Args:
        target: new folder.
        composition: how.
        sources: folders of the members.
        learned: what `composition` learned of them.
        record: what else ``composition.json`` says, for people.
        load: makes the model of a source.
    Raises:
        OSError: the target is there already.
    """
    with whole_folder(target) as folder:
        for number, source in enumerate(sources):
            write_model(load(source), member_folder(folder, number), source)
        save_file({name: value.contiguous() for name, value in learned.items()}, folder / LEARNED)
        about = {"format": FORMAT, "composition": config_to_dict(composition)}
        write_json(folder / RECORD, {**about, "members": len(sources), **record})


def member_folder(folder: str | Path, number: int) -> Path:
    """Where a member is."""
    return Path(folder) / f"member-{number}"


def load_composed(folder: str | Path) -> Composed:
    """Load what `write_composed` wrote, in eval mode; no code of a folder runs.

    Members are read as strictly as by `load_pretrained`.

    Raises:
        FileNotFoundError: no such folder, or a part of it is missing.
        ValueError: a damaged file, links that leave the folder, an unknown composition, or parts
            that do not belong together.
    """
    folder = Path(folder)
    if not is_composed(folder):
        raise FileNotFoundError(
            f"folder={str(folder)!r} holds no {RECORD}; `etr compose` makes one"
        )
    check_links(folder)
    record, path = read_object(folder / RECORD), folder / RECORD
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{path} is of format {record.get('format')!r}; this version reads {FORMAT}"
        )
    about, count = record.get("composition"), record.get("members")
    if not isinstance(about, dict) or type(count) is not int or count < 1:
        raise ValueError(f"{path} must say a composition, and the number of its members")
    folders = [member_folder(folder, number) for number in range(count)]
    for member in folders:
        if member.is_symlink():
            raise ValueError(f"{member} is a link; put the model itself there")
    imports = record.get("imports")
    with told_to_import(str(folder), map(str, imports) if isinstance(imports, list) else ()):
        composition = COMPOSITIONS.from_dict(about)
        members = [load_pretrained(member) for member in folders]
    return Composed(composition, members, _read_learned(folder / LEARNED))


def _read_learned(path: Path) -> Learned:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy the folder again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
