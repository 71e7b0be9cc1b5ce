"""Folders of several language models that answer as one, and generating with them.

A folder holds ``composition.json`` (which composition, and how many members), what it learned in
``learned.safetensors``, and the members as model folders ``member-0``, ``member-1``, ...; where a
language model was trained to choose for each token, that one as ``router``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from etr.files import read_object, whole_folder, write_json
from etr.hf.convert import write_model
from etr.hf.decode import generate, together
from etr.hf.loading import load_pretrained
from etr.hf.modeling import EtrForCausalLM
from etr.methods import told_to_import
from etr.model import COMPOSITIONS, Composition, Decoding
from etr.model.composition import (
    Learned,
    PromptComposition,
    TokenComposition,
    check_shapes,
)
from etr.pretrained import check_links
from etr.table import config_to_dict

RECORD, LEARNED, ROUTER = "composition.json", "learned.safetensors", "router"
CHOICE = "choice"
"""What is learned beside a router: the weight of a second head, a score for each member, [M, H]."""
FORMAT = 1


class TokenRouter(nn.Module):
    """A language model with a second head, which scores members at every place.

    Args:
        model: the language model.
        choice: weight of the second head, [M, H].
    """

    def __init__(self, model: EtrForCausalLM, choice: Tensor) -> None:
        super().__init__()
        self.model, self.choice = model, nn.Parameter(choice)
        model.lm_head.register_forward_pre_hook(self._keep)
        self._hidden: Tensor

    def _keep(self, head: nn.Module, args: tuple[Tensor]) -> None:
        (self._hidden,) = args

    def scores(self) -> Tensor:
        """Of each member, at the places whose logits the last forward gave, float [B, S, M]."""
        return F.linear(self._hidden, self.choice.to(self._hidden.dtype))


class Composed(nn.Module):
    """Several language models that answer as one, in eval mode.

    Args:
        composition: how.
        members: of one vocabulary.
        learned: what `composition` learned of them.
        router: the language model that chooses for each token, where the composition has one.
    Raises:
        ValueError: the vocabularies differ, or what was learned is not of these models.
    """

    def __init__(
        self,
        composition: Composition,
        members: Sequence[EtrForCausalLM],
        learned: Learned,
        router: EtrForCausalLM | None = None,
    ) -> None:
        super().__init__()
        models = [*members, *([] if router is None else [router])]
        vocabularies = {model.config.vocab_size for model in models}
        if len(vocabularies) != 1:
            raise ValueError(
                f"members have vocabularies of {sorted(vocabularies)} tokens; one only"
            )
        composition.check(learned, len(members), *vocabularies)
        self.composition, self.learned = composition, learned
        self.members, self.router = nn.ModuleList(members), None
        if isinstance(composition, TokenComposition):
            assert router is not None
            check_shapes(learned, {CHOICE: (len(members), router.config.hidden_size)})
            self.router = TokenRouter(router, learned[CHOICE])
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
        """Continue prompts: each by its member, as that one does alone, or by all of them.

        Args:
            decoding: of the member; plain where all models write together.
            ids, attention_mask: prompts, [B, S], padded on the left.
            options: of transformers' ``generate``.
        Returns:
            Prompts and what follows, [B * sequences, S']; behind shorter ones, padding.
        Raises:
            ValueError: an option that returns more than tokens of one model; another decoding of
                several.
        """
        if self.router is not None:
            if decoding.name != "plain":
                raise ValueError(
                    f"decoding={decoding.name!r} is for one model; these write together"
                )
            with self.writing_together(self.router) as model:
                return model.generate(ids, attention_mask=attention_mask, **options)
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

    @contextmanager
    def writing_together(self, router: TokenRouter) -> Iterator[EtrForCausalLM]:
        """The router, whose every forward gives the logits that are made of all models'."""
        composition = self.composition
        assert isinstance(composition, TokenComposition)

        def combine(logits: Sequence[Tensor]) -> Tensor:
            own, *others = logits
            members = torch.stack([one.log_softmax(-1) for one in others], 2)
            return composition.combine(own, router.scores(), members)

        members: list[Any] = list(self.members)
        with together(router.model, members, combine):
            yield router.model


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
    router: EtrForCausalLM | None = None,
) -> None:
    """Write a composed model, whole or not at all; one member at a time is in memory.

    Args:
        target: new folder.
        composition: how.
        sources: folders of the members.
        learned: what `composition` learned of them.
        record: what else ``composition.json`` says, for people.
        load: makes the model of a source.
        router: the language model that was trained beside the members, if one was.
    Raises:
        OSError: the target is there already.
    """
    with whole_folder(target) as folder:
        for number, source in enumerate(sources):
            write_model(load(source), member_folder(folder, number), source)
        if router is not None:
            write_model(router, folder / ROUTER, sources[0])
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
    for member in (*folders, folder / ROUTER):
        if member.is_symlink():
            raise ValueError(f"{member} is a link; put the model itself there")
    imports = record.get("imports")
    with told_to_import(str(folder), map(str, imports) if isinstance(imports, list) else ()):
        composition = COMPOSITIONS.from_dict(about)
        members = [load_pretrained(member) for member in folders]
        chooses = isinstance(composition, TokenComposition)
        router = load_pretrained(folder / ROUTER) if chooses else None
    return Composed(composition, members, _read_learned(folder / LEARNED), router)


def _read_learned(path: Path) -> Learned:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy the folder again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
