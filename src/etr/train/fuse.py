"""A language model is trained to choose, for each token, which of several others writes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etr.data import IGNORED, OpenedData, TokenLoader
from etr.hf import EtrForCausalLM
from etr.hf.composed import CHOICE, TokenRouter, write_composed
from etr.model.composition import Phase, Seen, TokenComposition
from etr.moe import selecting, set_eval_selection
from etr.moe.training import attach
from etr.train.compose import (
    ComposeConfig,
    Outcome,
    by_domain,
    held_out_rows,
    model_name,
    open_text,
    training_rows,
)
from etr.train.model import build_model, find_device, widen_weights
from etr.train.step import take_step

log = logging.getLogger(__name__)


def compose_by_token(
    composition: TokenComposition,
    folders: Sequence[Path],
    load: Callable[[Path], EtrForCausalLM],
    config: ComposeConfig,
    out: Path,
    imports: Sequence[str] = (),
    on_step: Callable[[int, str], None] = lambda step, text: None,
) -> Outcome:
    """Train a router beside members, which stay as they are, write the folder, and measure it.

    Args:
        composition: what the router is trained on.
        folders: of the members, each with its tokenizer; all are in memory.
        load: makes the model of one.
        config: on what text, and the router's sizes.
        out: new folder.
        imports: files that models were made with, for the record.
        on_step: called with the number of steps done and how it goes.
    Raises:
        ValueError: tokenizers or vocabularies differ, or a domain has too little text.
    """
    data, device = open_text(folders, config.data), find_device(config.device)
    members = [load(folder).to(device) for folder in folders]  # type: ignore[arg-type]
    router = _new_router(load, config, data).to(device)  # type: ignore[arg-type]
    for folder, member in zip(folders, members, strict=True):
        if member.config.vocab_size != router.config.vocab_size:
            raise ValueError(
                f"{folder} has a vocabulary of {member.config.vocab_size} tokens, and the router "
                f"one of {router.config.vocab_size}; let --start name a model of the members' own"
            )
        set_eval_selection(member, config.selection)
        member.requires_grad_(False)
    choice = torch.zeros(len(members), router.config.hidden_size, device=device)
    models = Models(TokenRouter(router, choice), members)
    train(models, composition, data, config, on_step)
    outcome = measure(models, composition, folders, data, config)
    learned = {CHOICE: models.router.choice.detach().cpu()}
    record = {
        "imports": [*imports],
        "made_of": [*map(model_name, folders)],
        "domains": data.dataset.domains,
        "held_out": outcome.losses,
        "routed_to_best_of_domain": outcome.routed,
    }
    write_composed(out, composition, folders, learned, record, load, router)
    return outcome


def _new_router(
    load: Callable[[Path], EtrForCausalLM], config: ComposeConfig, data: OpenedData
) -> EtrForCausalLM:
    if config.start is None:
        return build_model(config.model, data.tokenizer, config.data.sequence_length, config.seed)
    model = load(Path(config.start))
    widen_weights(model)
    return model


@dataclass(frozen=True)
class Models:
    """A router, and the members that it chooses from."""

    router: TokenRouter
    members: Sequence[EtrForCausalLM]

    def see(self, ids: Tensor, labels: Tensor, before: Tensor | None = None) -> Seen:
        """What all of them say of ids [B, S]; the router's part with gradient."""
        with torch.no_grad():
            said = [_log_probs(member(input_ids=ids).logits) for member in self.members]
        own = self.router.model(input_ids=ids).logits
        return Seen(
            own=own.to(said[0].dtype),
            choice=self.router.scores().to(said[0].dtype),
            members=torch.stack(said, 2),
            labels=labels,
            before=before,
        )


def train(
    models: Models,
    composition: TokenComposition,
    data: OpenedData,
    config: ComposeConfig,
    on_step: Callable[[int, str], None],
) -> None:
    """Train the router through the phases of a composition."""
    total, done = sum(phase.steps for phase in composition.phases), 0
    if not total:
        return
    router = models.router
    optimizer = torch.optim.AdamW(router.parameters(), weight_decay=0.0)
    attachment = attach(router.model, optimizer, total)
    loader = TokenLoader(
        data.dataset,
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size,
        seed=config.seed,
        domain_weights=dict.fromkeys(data.dataset.domains, 1.0),
    )
    router.train()
    for phase in composition.phases:
        pairs = make_pairs(models, data, config) if phase.pairs and phase.steps else []
        for step in range(phase.steps):
            batch = next(loader).to(router.choice.device)
            pair = pairs[step % len(pairs)] if pairs else None

            def backward(
                batch: Any = batch, pair: Pair | None = pair, phase: Phase = phase
            ) -> float:
                seen = models.see(batch.input_ids, batch.labels)
                both = None if pair is None else pair.seen(models, config.selection)
                loss = composition.loss(phase, seen, both)
                loss.backward()
                return float(loss.detach())

            found, done = take_step(optimizer, backward, phase.learning_rate), done + 1
            on_step(done, f"{phase.name} {found:.4f}")
    attachment.detach()
    router.eval()


@dataclass(frozen=True)
class Pair:
    """Texts of one batch and what the wrong member wrote in their place, [B, S] each."""

    ids: tuple[Tensor, Tensor]
    prompt_length: int
    before: tuple[Tensor, Tensor] | None = None
    """Log-probabilities that the router gave before, [B, S] each."""

    def seen(self, models: Models, selection: str) -> tuple[Seen, Seen]:
        """What the models say of both, as they are served."""
        with selecting(models.router.model, selection):
            better, worse = (
                models.see(ids, following(ids, self.prompt_length), before)
                for ids, before in zip(self.ids, self.before or (None, None), strict=True)
            )
        return better, worse


def following(ids: Tensor, prompt_length: int) -> Tensor:
    """The token after each place, from the last of the prompt on; int64 [B, S]."""
    labels = torch.full_like(ids, IGNORED)
    labels[:, prompt_length - 1 : -1] = ids[:, prompt_length:]
    return labels


@torch.no_grad()
def make_pairs(models: Models, data: OpenedData, config: ComposeConfig) -> list[Pair]:
    """Batches of training text, and of what the member that expects it least writes instead."""
    length, size = config.prompt_length, config.data.batch_size
    rows, _ = training_rows(data, config.data.sequence_length, config.prompts_per_domain)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))
    found = []
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        for number, ids in enumerate(rows[order].to(models.router.choice.device).split(size), 1):
            log.info("pairs of continuations, batch %d", number)
            labels = following(ids, length)
            losses = torch.stack(
                [_row_means(_log_probs(m(input_ids=ids).logits), labels) for m in models.members], 1
            )
            pair = Pair((ids, _written(models.members, losses.argmax(1), ids, length)), length)
            better, worse = (
                _of_labels(s.own.log_softmax(-1), s.labels)
                for s in pair.seen(models, config.selection)
            )
            found.append(Pair(pair.ids, length, (better, worse)))
    return found


def _written(
    members: Sequence[EtrForCausalLM], writer: Tensor, ids: Tensor, prompt_length: int
) -> Tensor:
    """What each row's writer puts behind its prompt, by sampling, [B, S]."""
    found, new = ids.clone(), ids.shape[1] - prompt_length
    for number in writer.unique().tolist():
        rows = (writer == number).nonzero()[:, 0]
        prompt = ids[rows, :prompt_length]
        found[rows] = members[number].generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            top_k=0,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,  # for rows that end; none does
        )
    return found


@torch.no_grad()
def measure(
    models: Models,
    composition: TokenComposition,
    folders: Sequence[Path],
    data: OpenedData,
    config: ComposeConfig,
) -> Outcome:
    """Held-out losses of each member, of those that are chosen, and of the sum."""
    names = [*map(model_name, folders), "chosen alone", "composed", "best of each token"]
    losses, choices, category = list[Tensor](), list[Tensor](), list[Tensor]()
    with selecting(models.router.model, config.selection):
        for number, batch in enumerate(held_out_rows(data, config), 1):
            log.info("held-out batch %d", number)
            batch = batch.to(models.router.choice.device)
            seen = models.see(batch.input_ids, batch.labels)
            alone = composition.combine(torch.zeros_like(seen.own), seen.choice, seen.members)
            both = composition.combine(seen.own, seen.choice, seen.members)
            each = [*seen.members.unbind(2), alone.log_softmax(-1), both.log_softmax(-1)]
            best = torch.stack([_of_labels(m, seen.labels) for m in seen.members.unbind(2)]).amax(0)
            rows = [_row_means(one, seen.labels) for one in each]
            rows.append(_mean_of(best, seen.labels))
            losses.append(torch.stack(rows, 1).double().cpu())
            choices.append(seen.choice.argmax(-1).cpu())
            category.append(batch.domain.cpu())
    domain, found = torch.cat(category), torch.cat(losses)
    columns = zip(names, found.unbind(1), strict=True)
    own = torch.stack(
        [found[domain == d, : len(folders)].mean(0) for d in range(len(data.dataset.domains))]
    ).argmin(1)
    routed = float((torch.cat(choices) == own[domain][:, None]).double().mean())
    return Outcome(
        losses={name: by_domain(column, domain, data.dataset.domains) for name, column in columns},
        notes=(
            f"{routed:.1%} of tokens are written by the model that is best on their domain; all "
            f"{len(folders)} and the router run at every token",
        ),
        routed=routed,
    )


def _log_probs(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _of_labels(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, [B, S]; of token 0 where there is none."""
    return log_probs.gather(-1, labels.clamp_min(0)[..., None])[..., 0]


def _row_means(log_probs: Tensor, labels: Tensor) -> Tensor:
    return _mean_of(_of_labels(log_probs, labels), labels)


def _mean_of(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of each row's labels, [B]."""
    counted = labels != IGNORED
    return -(log_probs * counted).sum(1) / counted.sum(1)
