"""Models whose experts do not fit: a few of each layer in fast memory, all of them elsewhere.

An expert that is needed and not there is read into the place of the one that a policy of
`etr.systems.cache` lets go. Values do not change: the same rows meet the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from etr.hf.config import EtrConfig
from etr.hf.loading import load_strictly
from etr.hf.modeling import EtrForCausalLM
from etr.hf.shards import ShardReader
from etr.moe import moe_layers
from etr.moe.dispatch import Permute
from etr.moe.experts import EXPERT_BACKENDS, ExpertParams, ExpertWeights
from etr.moe.experts.bank import Bank, Dispatch
from etr.moe.experts.uniform import Uniform
from etr.moe.routing import Routing, Selection
from etr.moe.rows import gather_rows
from etr.systems.cache import CACHES, Memory, Replayed

Where = Literal["disk", "cpu"]
Fetch = Callable[[str, int, Tensor], None]
"""Writes an expert's part of a tensor, by its name in the bank, into memory given."""


@dataclass(frozen=True, kw_only=True)
class Offload:
    """Where experts are, and how many are in fast memory."""

    resident: int
    """Experts of each layer that are there at a time."""
    where: Where = "disk"
    """disk: in the model's folder; cpu: in host memory, for a model on another device."""
    cache: str = "lru"
    """Who leaves: a policy of `etr.systems.CACHES` that knows nothing of what comes."""

    def __post_init__(self) -> None:
        if self.where not in ("disk", "cpu"):
            raise ValueError(f"where={self.where!r} must be disk or cpu")
        if self.resident < 1:
            raise ValueError(f"resident={self.resident} must be at least 1, experts of each layer")
        kind = CACHES.parse(self.cache)
        if kind.foresees or kind.predicts:
            raise ValueError(
                f"cache={self.cache!r} goes by what a text will use, or by what it learned of "
                "another trace: neither is there while a text is written"
            )


class OffloadedExperts(Bank):
    """A bank without parameters: slots for a few experts, which it fills as they are needed.

    Args:
        like: the weights in whose place it stands, perhaps on the meta device.
    """

    memory: Memory

    def __init__(self, like: ExpertWeights) -> None:
        super().__init__()
        self.num_experts, self._like = like.num_experts, (like.activation, like.clamp)
        self.shapes = {name: tuple(value.shape) for name, value in like.weights()}
        self._up, self._size = like.up_name, like.size_of_one
        self._slots: dict[str, Tensor] = {}
        self._slot_of: dict[int, int] = {}
        self._free: list[int] = []

    def connect(self, fetch: Fetch, offload: Offload) -> None:
        """Say where the experts come from; the memory is empty."""
        self._fetch, self.resident = fetch, min(offload.resident, self.num_experts)
        policy = CACHES.parse(offload.cache).start(())
        # One more for an expert that is used and does not stay.
        self._num_slots = self.resident + policy.computes_elsewhere
        self._slot_of, self._free = {}, list(range(self.resident))
        self.memory = Memory(policy, self.resident, self._move)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if hasattr(self, "memory"):
            raise ValueError(
                "experts are offloaded, and a folder without them would be damaged: copy the "
                "model's own, or load it by load_pretrained"
            )

    @property
    def parts(self) -> Sequence[ExpertWeights]:
        return ()

    @property
    def sizes(self) -> list[float]:
        return [self._size] * self.num_experts

    def forward(self, x: Tensor, dtype: torch.dtype, run: Callable[..., Any]) -> Any:
        return run(x)

    def run(
        self,
        x: Tensor,
        routing: Routing,
        selection: Selection,
        params: Sequence[ExpertParams],
        dispatch: Dispatch,
    ) -> Tensor:
        """What tokens x [T, H] get, one expert after the other. Waits for the device.

        Raises:
            ValueError: a backward pass would follow.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("experts that are offloaded cannot be trained; use torch.no_grad()")
        self._allocate(x)
        local = Permute()
        handle = local.plan(routing, selection, padded=False)
        rows = gather_rows(x, handle.token_of_row, padded=False)
        counts = handle.num_tokens_per_expert
        ends = [0, *accumulate(counts.tolist())]
        used = list(dict.fromkeys(routing.expert[selection.kept].tolist()))
        out = torch.empty_like(rows)
        self.memory.begin({expert: ends[expert + 1] - ends[expert] for expert in used})
        for expert in used:
            self.memory.use(expert)
            mine = slice(ends[expert], ends[expert + 1])
            if expert not in self._slot_of:
                self._fill(self._slots, expert, self.resident)
            weights = self._params(self._slot_of.get(expert, self.resident))
            out[mine] = EXPERT_BACKENDS["loop"].run(rows[mine], counts[expert, None], weights)
        return local.combine(out, handle)

    def expert_bytes(self, dtype: torch.dtype) -> int:
        """Memory of one expert."""
        return int(self._size) * dtype.itemsize

    def slot_bytes(self, dtype: torch.dtype) -> int:
        """Memory of all slots."""
        return int(self._num_slots * self._size) * dtype.itemsize

    def _allocate(self, x: Tensor) -> None:
        """Slots where the tokens are; those of another device or dtype are forgotten."""
        old = self._slots.get(self._up)
        if old is not None and (old.device, old.dtype) == (x.device, x.dtype):
            return
        slots = {
            name: x.new_empty(self._num_slots, *shape[1:]) for name, shape in self.shapes.items()
        }
        for expert, slot in self._slot_of.items():
            self._fill(slots, expert, slot)
        self._slots = slots

    def _move(self, comes: int, leaves: int | None) -> None:
        if leaves is not None:
            self._free.append(self._slot_of.pop(leaves))
        self._fill(self._slots, comes, self._free[-1])
        self._slot_of[comes] = self._free.pop()  # one that a failed read left half filled is free

    def _fill(self, slots: dict[str, Tensor], expert: int, slot: int) -> None:
        for name, values in slots.items():
            self._fetch(name, expert, values[slot])

    def _params(self, slot: int) -> ExpertParams:
        def one(name: str) -> Tensor | None:
            return self._slots[name][slot, None] if name in self._slots else None

        up, down, (activation, clamp) = one(self._up), one("down_proj"), self._like
        assert up is not None
        assert down is not None
        return ExpertParams(
            up=up,
            down=down,
            activation=activation,
            up_bias=one(f"{self._up}_bias"),
            down_bias=one("down_proj_bias"),
            clamp=clamp,
        )


class _WithoutExperts(EtrForCausalLM):
    """A model whose banks have no weights."""

    def __init__(self, config: EtrConfig) -> None:
        super().__init__(config)
        for layer in moe_layers(self):
            if not isinstance(layer.config.bank_config, Uniform):
                raise ValueError(
                    f"experts={layer.config.bank_config.name!r}: only uniform experts can be "
                    "offloaded"
                )
            if layer.config.inner_steps > 1:
                raise ValueError(
                    f"inner_steps={layer.config.inner_steps}: steps that share their experts "
                    "cannot be offloaded"
                )
            (weights,) = layer.bank.parts
            layer.experts = OffloadedExperts(weights)


def load_offloaded(
    folder: str | Path, offload: Offload, dtype: torch.dtype | None = None
) -> EtrForCausalLM:
    """Load a model of this library in eval mode, without its experts, as `load_pretrained` does.

    Memory holds everything but the experts, and `resident` experts of each layer; with
    ``where="cpu"`` host memory holds all of them too.

    Args:
        folder: holds config.json and *.safetensors; disk reads them for as long as the model runs.
        offload: where experts are, and how many are in fast memory.
        dtype: see `load_pretrained`.
    Raises:
        FileNotFoundError, ValueError: see `load_pretrained`; or experts that are not uniform, or of
            another shape.
    """
    reader = ShardReader(folder)
    model = load_strictly(_WithoutExperts, reader, dtype, left=lambda key: ".experts." in key)
    model.__class__ = EtrForCausalLM
    if not banks(model):
        raise ValueError(f"{str(folder)!r} has no MoE layer whose experts could be offloaded")
    for prefix, bank in banks(model):
        for name, shape in bank.shapes.items():
            if reader.shape(prefix + name) != shape:
                raise ValueError(
                    f"{prefix + name} in {str(folder)!r} has shape {reader.shape(prefix + name)}; "
                    f"its config.json asks for {shape}"
                )
        bank.connect(_fetch(reader, prefix, bank, offload.where), offload)
    return model


def banks(model: EtrForCausalLM) -> list[tuple[str, OffloadedExperts]]:
    """The offloaded banks, layer after layer, by the beginning of their tensors' names."""
    named = model.named_modules()
    return [(f"{name}.", one) for name, one in named if isinstance(one, OffloadedExperts)]


def usage(model: EtrForCausalLM) -> Replayed:
    """What the memories of all layers did so far."""
    return Replayed.of(bank.memory for _, bank in banks(model))


def begin_step(model: EtrForCausalLM, step: int) -> None:
    """Tell memories which step of a block comes, as `etr.hf.fill` counts them."""
    for _, bank in banks(model):
        bank.memory.count_from(step)


def resident_bytes(model: EtrForCausalLM) -> int:
    """Bound of what the model holds on its device: all that is not offloaded, and the slots."""
    whole = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return whole + sum(bank.slot_bytes(model.dtype) for _, bank in banks(model))


def _fetch(reader: ShardReader, prefix: str, bank: OffloadedExperts, where: Where) -> Fetch:
    if where == "cpu":
        held = {name: reader.tensor(prefix + name) for name in bank.shapes}
        return lambda name, expert, into: _copy(held[name][expert], into)
    files = {name: reader.file(prefix + name) for name in bank.shapes}

    def fetch(name: str, expert: int, into: Tensor) -> None:
        # Opened anew each time: what is mapped stays in memory for as long as the file is open.
        with safe_open(files[name], framework="pt") as file:
            _copy(file.get_slice(prefix + name)[expert : expert + 1][0], into)

    return fetch


@torch.no_grad()
def _copy(value: Tensor, into: Tensor) -> None:
    into.copy_(value)
