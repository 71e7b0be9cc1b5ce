"""`teacher`: regression on the outputs of a teacher that is itself a mixture of experts.

A share of the tokens is easy: one linear map, the same for all, gives their target. The others
belong to one of 16 domains, each with a two-layer network of its own. The student sees the input
alone; what domain a token is of shows in where its input lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etr.moe import Collector, MoE, MoEConfig, RoutingContext
from etr.train.config import TrainConfig
from etr.train.tasks.base import Forward

NUM_DOMAINS = 16
HELD_OUT_BATCHES = 16


@dataclass(frozen=True, kw_only=True)
class TeacherBatch:
    """Inputs and targets [T, H]; domain [T], 0 for easy tokens."""

    x: Tensor
    target: Tensor
    domain: Tensor


class Teacher:
    """Fixed random networks; targets have unit variance.

    Args:
        width: of inputs and targets.
        easy: share of easy tokens.
        seed: of the networks.
    """

    def __init__(self, width: int, easy: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.width, self.easy = width, easy
        self.centre = 2 * F.normalize(normal(NUM_DOMAINS + 1, width), dim=-1) * width**0.5
        self.linear = normal(width, width) * (5 * width) ** -0.5
        self.first = normal(NUM_DOMAINS, width, width) * (5 * width) ** -0.5
        self.second = normal(NUM_DOMAINS, width, width) * width**-0.5
        self.mean, self.scale = torch.zeros(width), torch.tensor(1.0)
        sample = self.sample(8192, generator).target
        self.mean, self.scale = sample.mean(0), (sample - sample.mean(0)).std()

    def sample(self, num_tokens: int, generator: torch.Generator) -> TeacherBatch:
        """Fresh tokens with their targets."""
        easy = torch.rand(num_tokens, generator=generator) < self.easy
        hard = torch.randint(1, NUM_DOMAINS + 1, (num_tokens,), generator=generator)
        domain = torch.where(easy, 0, hard)
        x = self.centre[domain] + torch.randn(num_tokens, self.width, generator=generator)
        target = x @ self.linear
        for d in range(NUM_DOMAINS):
            rows = domain == d + 1
            target[rows] = torch.tanh(2 * x[rows] @ self.first[d]) @ self.second[d]
        target = (target - self.mean) / self.scale
        return TeacherBatch(x=x, target=target, domain=domain)


class Student(nn.Module):
    """Linear in, one residual MoE layer, linear out."""

    def __init__(self, moe: MoEConfig) -> None:
        super().__init__()
        width = moe.hidden_size
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.RMSNorm(width)
        self.moe = MoE(moe)
        generator = torch.Generator().manual_seed(torch.initial_seed() + 1)
        for weight in self.moe.experts.parameters():
            nn.init.normal_(weight, std=width**-0.5, generator=generator)

    def forward(self, x: Tensor) -> tuple[Tensor, Collector]:
        """Predictions [T, H], and what the MoE layer left."""
        h = self.inner(x)
        with Collector(self, ambient=False) as collector:
            context = RoutingContext(collector=collector)
            h = h + self.moe(self.norm(h), context).hidden_states
        return self.outer(h), collector


class TeacherTask:
    """Mean squared error against a mixture of networks.

    Args:
        easy: share of easy tokens, in [0, 1).
    """

    unit = "squared error"
    corpus = ""

    def __init__(self, easy: float) -> None:
        if not 0 <= easy < 1:
            raise ValueError(f"easy={easy} must be a share of the tokens in [0, 1)")
        self.easy = easy
        self.domains = ("easy", *(f"hard {d}" for d in range(NUM_DOMAINS)))

    def teacher(self, config: TrainConfig) -> Teacher:
        """Another teacher with every seed."""
        return Teacher(config.model.hidden_size, self.easy, 10_000 + config.seed)

    def build(self, config: TrainConfig) -> nn.Module:
        """A fresh student."""
        torch.manual_seed(config.seed)
        return Student(config.model.moe_config())

    def training_batches(self, config: TrainConfig) -> Iterator[TeacherBatch]:
        """Fresh tokens at every step."""
        return self._batches(config, 20_000 + config.seed)

    def documents(self, config: TrainConfig) -> None:
        """None: tokens are drawn one by one."""

    def held_out_batches(self, config: TrainConfig) -> Iterator[TeacherBatch]:
        """The same tokens at every call."""
        batches = self._batches(config, 30_000 + config.seed)
        return (next(batches) for _ in range(HELD_OUT_BATCHES))

    def forward(self, model: nn.Module, batch: TeacherBatch) -> Forward:
        """Squared error of each token, mean over its dimensions."""
        prediction, collector = model(batch.x)
        return Forward(
            token_losses=(prediction - batch.target).square().mean(-1),
            valid=torch.ones_like(batch.domain, dtype=torch.bool),
            domain=batch.domain,
            router_losses=collector.losses(),
            stats=collector.stats(),
        )

    def _batches(self, config: TrainConfig, seed: int) -> Iterator[TeacherBatch]:
        teacher, generator = self.teacher(config), torch.Generator().manual_seed(seed)
        num_tokens = config.data.sequence_length * config.data.batch_size
        while True:
            yield teacher.sample(num_tokens, generator)
