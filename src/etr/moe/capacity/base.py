"""What every capacity policy is: a frozen config that builds a module with `limit`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor

from etr.moe.checked import check_types
from etr.moe.learner import Learner
from etr.moe.lower_bound import erfc_bound
from etr.moe.routing import Limit, Routing


@overload
def capacity_tokens(factor: float, num_tokens: int, top_k: int, num_experts: int) -> int: ...
@overload
def capacity_tokens(
    factor: float | Tensor, num_tokens: Tensor, top_k: int, num_experts: int
) -> Tensor: ...
def capacity_tokens(
    factor: float | Tensor, num_tokens: int | Tensor, top_k: int, num_experts: int
) -> int | Tensor:
    """Capacity of one expert: ``ceil(factor * T * k / E - 1e-6)`` tokens.

    The slack keeps rounding from turning an exact integer into the next one.

    Args:
        factor: capacity factor, no unit; 1 gives every expert the mean load.
        num_tokens: T; an int gives an int, an int64 tensor gives an int64 tensor.
    """
    if isinstance(num_tokens, Tensor):
        return (factor * num_tokens.double() * top_k / num_experts - 1e-6).ceil().long()
    return math.ceil(cast(float, factor) * num_tokens * top_k / num_experts - 1e-6)


class Ratio(NamedTuple):
    """A capacity factor as a fraction too, in whole numbers, which compiled code can keep open.

    What it computes of a number of tokens then holds for any number of them; floating-point
    numbers would tie it to one, and compile anew for each length.
    """

    factor: float
    numerator: int
    denominator: int

    @classmethod
    def of(cls, factor: float) -> Ratio:
        """A fraction within 1e-12 of a factor, relative to it, with a small denominator if any is.

        Denominators are up to 10**6, else 10**9, else those of the floating-point number itself.
        """
        exact = Fraction(factor)
        found = (exact.limit_denominator(most) for most in (10**6, 10**9))
        near = (one for one in found if abs(one - exact) <= exact / 10**12)
        return cls(factor, *next(near, exact).as_integer_ratio())

    def tokens(self, num_tokens: int, top_k: int, num_experts: int) -> int:
        """`capacity_tokens` of a number that the host knows."""
        whole = self.denominator * num_experts
        return -((whole // 10**6 - self.numerator * num_tokens * top_k) // whole)


MEAN_LOAD = Ratio.of(1.0)


def check_factor(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}={value} must be a finite number > 0; 1 is the mean load")


@dataclass(frozen=True, kw_only=True)
class CapacityConfig:
    """Options that every policy has."""

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    needs_probs: ClassVar[bool] = False
    needs_score_ranking: ClassVar[bool] = False
    needs_cosine: ClassVar[bool] = False

    min_capacity: int = 1
    """Smallest capacity, tokens per expert."""
    floor: Literal["none", "erfc"] = "none"
    """Raise the capacity to the lower bound of arXiv 2406.00023, Remark 7, at the last step's
    99th percentile of chosen affinities, but never above the mean load."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.min_capacity < 0:
            raise ValueError(f"min_capacity={self.min_capacity} must be >= 0 tokens")

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> CapacityPolicy:
        """Make the policy's module."""
        raise NotImplementedError


class CapacityPolicy(Learner):
    """Base of the policies: applies `min_capacity` and `floor` to what `_limit` returns.

    Args:
        config: the policy's options.
        hidden_size, num_experts, top_k: sizes of the layer.
    """

    def __init__(
        self, config: CapacityConfig, hidden_size: int, num_experts: int, top_k: int
    ) -> None:
        super().__init__()
        self.config = config
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k

    @property
    def needs_probs(self) -> bool:
        """Whether it sums choosers' probabilities."""
        return self.config.needs_probs

    def limit(self, routing: Routing, threshold: Tensor, affinity_p99: Tensor) -> Limit:
        """What experts may keep of `routing`.

        Args:
            routing: the choices of T tokens.
            threshold: calibrated scores, float32 [E].
            affinity_p99: 99th percentile of chosen scores in the last step, float32 [].
        """
        limit = self._limit(routing, threshold)
        if limit.capacity is None:
            return limit
        capacity, buffer = limit.capacity, limit.buffer_size
        least, least_buffer = self.config.min_capacity, self.config.min_capacity
        if self.config.floor == "erfc":
            mean_load = self._tokens(MEAN_LOAD, routing)
            bound = erfc_bound(self.hidden_size, self.num_experts, affinity_p99).ceil()
            bound = torch.minimum(bound, mean_load.double()).long()
            capacity = torch.maximum(capacity, bound)
            least_buffer = max(least_buffer, self._buffer(MEAN_LOAD, routing))
        if buffer is not None:
            buffer = min(max(buffer, least_buffer), routing.num_tokens)
        capacity = capacity.clamp(least, buffer)
        return Limit(capacity=capacity, min_score=limit.min_score, buffer_size=buffer)

    def imitated_limit(self, routing: Routing, threshold: Tensor, affinity_p99: Tensor) -> Limit:
        """The capacities that thresholds stand for: `limit`, or that of the policy it imitates."""
        return self.limit(routing, threshold, affinity_p99)

    def _limit(self, routing: Routing, threshold: Tensor) -> Limit:
        raise NotImplementedError

    def _tokens(self, factor: Ratio | Tensor, routing: Routing) -> Tensor:
        """Capacity from the valid tokens, int64 [] on the device."""
        sizes = (self.top_k, self.num_experts)
        if isinstance(factor, Tensor):
            return capacity_tokens(factor, routing.num_valid_tokens(), *sizes)
        if routing.full:  # the host knows how many they are
            return routing.expert.new_full((), factor.tokens(routing.num_tokens, *sizes))
        return capacity_tokens(factor.factor, routing.num_valid_tokens(), *sizes)

    def _buffer(self, factor: Ratio, routing: Routing) -> int:
        """Static buffer: capacity from the padded count, at most every token."""
        size = factor.tokens(routing.num_tokens, self.top_k, self.num_experts)
        return min(size, routing.num_tokens)

    def _uniform(self, factor: Ratio | Tensor, routing: Routing, most: Ratio) -> Limit:
        return Limit(
            capacity=self._tokens(factor, routing).expand(self.num_experts),
            buffer_size=self._buffer(most, routing),
        )
