"""Regressions on clustered tokens, on which the measured criteria of methods train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from etr.methods import METHODS
from etr.moe import Collector, MoE, MoEConfig, attach

H, E, I, BATCH, RATE = 16, 8, 24, 256, 3e-3  # noqa: E741
Target = Callable[["Toy", Tensor, Tensor], Tensor]


def regressed(toy: Toy, x: Tensor, cluster: Tensor) -> Tensor:
    """y = tanh(2 A_c x), another map for every cluster."""
    return torch.tanh(2 * torch.einsum("td,tdh->th", x, toy.maps[cluster]))


@dataclass
class Toy:
    """Clusters with centres N(0, I), noise 0.3, and random maps of variance 1 / H.

    Args:
        seed: of centres and maps.
        zipf: cluster c has weight 1 / (1 + c); else all are alike.
        clusters: how many there are.
        target: of the tokens.
    """

    seed: int
    zipf: bool = False
    clusters: int = 16
    target: Target = regressed

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(100 + self.seed)
        self.centres = torch.randn(self.clusters, H, generator=generator)
        self.maps = torch.randn(self.clusters, H, H, generator=generator) / H**0.5
        self.extra = torch.randn(self.clusters, H, generator=generator)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [count, H], their targets, and their clusters."""
        weights = 1 / (1 + torch.arange(self.clusters).float()) if self.zipf else None
        if weights is None:
            cluster = torch.randint(self.clusters, (count,), generator=generator)
        else:
            cluster = torch.multinomial(weights, count, True, generator=generator)
        x = self.centres[cluster] + 0.3 * torch.randn(count, H, generator=generator)
        return x, self.target(self, x, cluster), cluster


class Net(nn.Module):
    """MoE layers; several are residual, each after a LayerNorm.

    Args:
        method: on the shelf.
        layers: how many.
        options: of the layers, beside the method's; sizes too.
    """

    def __init__(self, method: str, layers: int = 1, **options: Any) -> None:
        super().__init__()
        sizes = {"hidden_size": H, "intermediate_size": I, "num_experts": E, "activation": "gelu"}
        config = MoEConfig(**{**sizes, **METHODS[method].config_options(), **options})
        self.norms = nn.ModuleList(nn.LayerNorm(H) for _ in range(layers if layers > 1 else 0))
        self.layers = nn.ModuleList(MoE(config, place) for place in range(layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """What is found [T, H], and the sum of the layers' losses."""
        with Collector(self) as collector:
            if not self.norms:
                return self.layers[0](x).hidden_states, collector.loss()
            for norm, layer in zip(self.norms, self.layers, strict=True):
                x = x + layer(norm(x)).hidden_states
            return x, collector.loss()


def train(
    model: nn.Module,
    toy: Toy,
    steps: int,
    after: Callable[[list[dict[str, Tensor]]], None] = lambda _: None,
) -> None:
    """AdamW 3e-3 to 3e-4 linearly on fresh batches of 256; `after` gets each layer's counters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    attached = attach(model, optimizer, steps)
    generator = torch.Generator().manual_seed(toy.seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - 0.9 * step / steps)
        x, y, _ = toy.draw(BATCH, generator)
        found, losses = model(x)
        optimizer.zero_grad()
        ((found - y).square().mean() + losses).backward()
        optimizer.step()
        after(attached.last_stats)
    attached.detach()


def error(model: nn.Module, toy: Toy, count: int = 8192) -> float:
    """Mean squared error on fresh tokens, in training mode: nothing is dropped here."""
    x, y, _ = toy.draw(count, torch.Generator().manual_seed(999))
    with torch.no_grad():
        return float((model(x)[0] - y).square().mean())
