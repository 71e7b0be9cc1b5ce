"""Several trained language models become one: who answers which prompt is learned from text."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from etr.data import Batch, DataConfig, OpenedData, held_out_batches, open_data
from etr.data.loader import spread
from etr.data.tokenizer import fingerprint, load_tokenizer
from etr.evaluate.continuations import continuation_losses
from etr.hf import EtrForCausalLM
from etr.hf.composed import write_composed
from etr.model.composition import PromptComposition, Prompts
from etr.moe.checked import check_types
from etr.moe.serving import serving_of
from etr.train.checkpoint_folder import FOLDER
from etr.train.config import ModelConfig
from etr.train.model import find_device

log = logging.getLogger(__name__)
ALL = "all"
"""Name of the row over all domains."""


@dataclass(frozen=True, kw_only=True)
class ComposeConfig:
    """The text that a composition learns from, and how much of it."""

    data: DataConfig = field(default_factory=DataConfig)
    """Text; its domains are the categories. The tokenizer is the models' own."""
    prompt_length: int = 128
    """Tokens of a prompt; what follows it in a row of text says how good a model is."""
    prompts_per_domain: int = 64
    """Prompts of each domain's training text to know it by or to make pairs of, and of its held-out
    text to choose models by; as many more are measured on at the end."""
    selection: str = "threshold"
    """How experts select: a name in SERVING, perhaps with options."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes of the language model that chooses for each token, where a composition trains one."""
    start: str | None = None
    """Checkpoint or run that becomes this model, in the place of a new one."""
    seed: int = 0
    """Seed of what is drawn."""
    device: str = "auto"
    """auto, cpu, cuda, npu, ..."""

    def __post_init__(self) -> None:
        check_types(self)
        serving_of(self.selection, "selection")
        for name in ("prompt_length", "prompts_per_domain"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.prompt_length >= self.data.sequence_length:
            raise ValueError(
                f"prompt_length={self.prompt_length} leaves nothing of a row of sequence_length="
                f"{self.data.sequence_length} tokens to judge by"
            )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the composed model does on held-out text that it did not learn from."""

    losses: dict[str, dict[str, float]]
    """Nats per token, by column of a table and by domain, `ALL` last."""
    notes: tuple[str, ...]
    """What else a person should know, in words."""
    routed: float | None = None
    """Share of tokens that the model writes which is best on their domain; None where a prompt has
    one model."""


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """Held-out rows, and each member's loss on what follows their prompts."""

    prompts: Prompts
    losses: Tensor
    """Float64 [rows, members]."""
    learned_from: Tensor
    """Every second row of a domain, bool [rows]."""
    sizes: Tensor
    """Bytes of each member's weights, float64 [members]."""
    vocab_size: int
    """Of the members."""


def compose_by_prompt(
    composition: PromptComposition,
    folders: Sequence[Path],
    load: Callable[[Path], EtrForCausalLM],
    config: ComposeConfig,
    out: Path,
    imports: Sequence[str] = (),
) -> Outcome:
    """Score members, let a composition learn who answers, write the folder, and measure it.

    Args:
        composition: what learns.
        folders: of the members, each with its tokenizer.
        load: makes the model of one; one at a time is in memory.
        config: on what text.
        out: new folder.
        imports: files that members were made with, for the record.
    Raises:
        ValueError: tokenizers differ, or a domain has too little text.
    """
    data = open_text(folders, config.data)
    ids, category = training_rows(data, config.prompt_length, config.prompts_per_domain)
    prompts = Prompts(ids=ids, category=category)
    scored = _score(folders, load, data, config)
    part = scored.learned_from
    kept, learned = composition.learn(prompts, _some(scored, part), scored.sizes, scored.vocab_size)
    tested = _some(scored, ~part)
    everywhere = torch.ones_like(tested.ids, dtype=torch.bool)
    chosen = torch.tensor(kept)[composition.choose(learned, tested.ids, everywhere)]
    outcome = _outcome(scored, kept, chosen, folders, data.dataset.domains)
    record = {
        "imports": [*imports],
        "made_of": [model_name(folders[number]) for number in kept],
        "domains": data.dataset.domains,
        "held_out": outcome.losses,
    }
    write_composed(out, composition, [folders[n] for n in kept], learned, record, load)
    return outcome


def model_name(folder: Path) -> str:
    """Its run, of a checkpoint; the folder itself of another model."""
    return str(folder.parent.parent if folder.parent.name == FOLDER else folder)


def open_text(folders: Sequence[Path], data: DataConfig) -> OpenedData:
    """Text in the tokens of several models.

    Raises:
        ValueError: their tokenizers differ.
    """
    prints = [fingerprint(load_tokenizer(folder)) for folder in folders]
    for folder, found in zip(folders, prints, strict=True):
        if found != prints[0]:
            raise ValueError(
                f"the tokenizers of {folders[0]} and {folder} differ: composed models share one"
            )
    return open_data(dataclasses.replace(data, tokenizer=str(folders[0])))


def training_rows(data: OpenedData, length: int, count: int) -> tuple[Tensor, Tensor]:
    """Rows of the training text of every domain, evenly spaced, and their domains.

    Args:
        length: tokens of a row, S.
        count: most rows of a domain.
    Returns:
        int64 [N, S] and [N].
    Raises:
        ValueError: a domain has fewer tokens than one row.
    """
    rows, category = [], list[int]()
    for number, shard in enumerate(data.dataset.train):
        starts = spread(range(0, len(shard.tokens) - length + 1, length), count)
        if not starts:
            raise ValueError(
                f"domain {shard.domain!r} has {len(shard.tokens)} training tokens, fewer than a "
                f"row of {length}; give more text or shorter rows"
            )
        rows += [shard.tokens[start : start + length].astype(np.int64) for start in starts]
        category += [number] * len(starts)
    return torch.from_numpy(np.stack(rows)), torch.tensor(category)


def held_out_rows(data: OpenedData, config: ComposeConfig) -> list[Batch]:
    """Held-out rows without padding, twice as many of each domain as prompts are asked for.

    Raises:
        ValueError: a domain has fewer than two.
    """
    length = config.data.sequence_length
    most = 2 * config.prompts_per_domain * length
    found = []
    for batch in held_out_batches(data.dataset, length, config.data.batch_size, most):
        whole = batch.valid_mask.all(1)
        found.append(Batch(**{name: value[whole] for name, value in vars(batch).items()}))
    rows = torch.bincount(
        torch.cat([batch.domain for batch in found]), minlength=len(data.dataset.domains)
    )
    for domain, count in zip(data.dataset.domains, rows.tolist(), strict=True):
        if count < 2:
            raise ValueError(
                f"domain {domain!r} has {count} held-out rows of sequence_length={length} tokens, "
                "and 2 are needed, to choose by and to measure on; give more text or shorter rows"
            )
    return [batch for batch in found if len(batch.domain)]


def _score(
    folders: Sequence[Path],
    load: Callable[[Path], EtrForCausalLM],
    data: OpenedData,
    config: ComposeConfig,
) -> _Scored:
    """Run each member on held-out text."""
    batches = held_out_rows(data, config)
    losses, sizes, vocabularies = list[Tensor](), list[int](), set[int]()
    for folder in folders:
        log.info("running %s on held-out text", folder)
        model = load(folder).to(find_device(config.device))  # type: ignore[arg-type]
        found = continuation_losses(model, batches, config.prompt_length, config.selection)
        losses.append(found)
        sizes.append(sum(weight.nbytes for weight in model.parameters()))
        vocabularies.add(model.config.vocab_size)
    category = torch.cat([batch.domain for batch in batches])
    ids = torch.cat([batch.input_ids for batch in batches])[:, : config.prompt_length]
    return _Scored(
        prompts=Prompts(ids=ids, category=category),
        losses=torch.stack(losses, 1),
        learned_from=_place_in_domain(category) % 2 == 0,
        sizes=torch.tensor(sizes, dtype=torch.float64),
        vocab_size=max(vocabularies),
    )


def _place_in_domain(category: Tensor) -> Tensor:
    """How many rows of the same domain stand before each."""
    same = F.one_hot(category)
    return (same.cumsum(0) * same).sum(1) - 1


def _some(scored: _Scored, rows: Tensor) -> Prompts:
    """Some of the rows, with scores."""
    prompts = scored.prompts
    score = -scored.losses[rows]
    return Prompts(ids=prompts.ids[rows], category=prompts.category[rows], score=score)


def _outcome(
    scored: _Scored,
    kept: Sequence[int],
    chosen: Tensor,
    folders: Sequence[Path],
    domains: Sequence[str],
) -> Outcome:
    """Losses on the rows that were not learned from, and who answered them.

    Args:
        chosen: who answers each of these rows, int64.
    """
    rows = ~scored.learned_from
    losses, category = scored.losses[rows], scored.prompts.category[rows]
    mean = torch.stack([losses[category == number].mean(0) for number in range(len(domains))])
    best = mean[:, kept].argmin(1)
    columns = {model_name(folder): losses[:, n] for n, folder in enumerate(folders)}
    columns["composed"] = losses.gather(1, chosen[:, None])[:, 0]
    own = torch.tensor(kept)[best][category]
    columns["best of each domain"] = losses.gather(1, own[:, None])[:, 0]
    sizes = scored.sizes / 1e6
    active = float(sizes[chosen].mean())
    notes = [
        f"{domain}: {name} answers {int(count)} of {int((category == number).sum())} prompts"
        for number, domain in enumerate(domains)
        for name, count in _answers(chosen[category == number], folders)
    ]
    notes.append(
        f"{len(kept)} of {len(folders)} models are kept, {float(sizes[kept].sum()):,.1f} of "
        f"{float(sizes.sum()):,.1f} MB; a prompt is answered by {active:,.1f} MB on average"
    )
    return Outcome(
        losses={name: by_domain(column, category, domains) for name, column in columns.items()},
        notes=tuple(notes),
    )


def _answers(chosen: Tensor, folders: Sequence[Path]) -> list[tuple[str, int]]:
    """Who answered how many prompts, who answered most first."""
    count = torch.bincount(chosen, minlength=len(folders))
    order = count.argsort(descending=True, stable=True).tolist()
    return [(model_name(folders[n]), int(count[n])) for n in order if count[n]]


def by_domain(loss: Tensor, category: Tensor, domains: Sequence[str]) -> dict[str, float]:
    """Mean of each domain's rows, and of all."""
    found = {name: float(loss[category == number].mean()) for number, name in enumerate(domains)}
    return {**found, ALL: float(loss.mean())}
