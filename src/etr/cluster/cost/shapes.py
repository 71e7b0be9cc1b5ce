"""What is trained, on what, and how it is divided: models, clusters and layouts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from etr.cluster.cost.described import check_units, zero_or_more
from etr.cluster.cost.links import Links


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder whose feed-forward layers are experts."""

    name: str
    """Shown in tables."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """All layers."""
    num_dense_layers: int = zero_or_more()
    """How many of them, the first ones, have a dense feed-forward instead of experts."""
    dense_size: int = zero_or_more()
    """Inner width of a dense feed-forward."""
    expert_size: int
    """Inner width of an expert."""
    num_experts: int
    """Routed experts of a layer."""
    top_k: int
    """Experts that a token chooses."""
    shared_size: int = zero_or_more()
    """Inner width of the experts that every token passes, together."""
    num_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Heads of keys and values."""
    head_size: int
    """Width of a head, that of values too."""
    query_rank: int = zero_or_more()
    """Width that queries are compressed to; 0: not at all."""
    key_value_rank: int = zero_or_more()
    """Width that keys and values are compressed to; 0: not at all."""
    rotary_size: int = zero_or_more()
    """Further width of a query head for positions, where keys and values are compressed."""
    query_key_norm: bool = False
    """Whether heads of queries and keys are normalized."""
    vocab_size: int
    """Rows of the embedding."""
    tied_embeddings: bool = False
    """Whether the output layer is the embedding."""

    def __post_init__(self) -> None:
        check_units(self)
        if self.num_dense_layers > self.num_layers or (
            self.num_dense_layers and not self.dense_size
        ):
            raise ValueError(
                f"num_dense_layers={self.num_dense_layers} must be at most num_layers="
                f"{self.num_layers}, and needs dense_size"
            )
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} must be at most {self.num_experts} experts")

    def attention_matrices(self) -> list[tuple[int, int]]:
        """Inputs and outputs of each projection of an attention layer."""
        hidden, heads, size = self.hidden_size, self.num_heads, self.head_size
        query = heads * (size + self.rotary_size)
        out = [(heads * size, hidden)]
        if self.key_value_rank:
            down = [(hidden, self.key_value_rank + self.rotary_size)]
            down += [(self.key_value_rank, 2 * heads * size)]
        else:
            down = [(hidden, 2 * self.num_key_value_heads * size)]
        if self.query_rank:
            return [(hidden, self.query_rank), (self.query_rank, query), *down, *out]
        return [(hidden, query), *down, *out]

    @property
    def attention_parameters(self) -> int:
        """Of one layer, with both of its norms."""
        norms = 2 * self.hidden_size + self.query_rank + self.key_value_rank
        norms += 2 * self.head_size * self.query_key_norm
        return sum(a * b for a, b in self.attention_matrices()) + norms

    def dense_parameters(self, layer: int) -> int:
        """Of a layer, all but its routed experts."""
        if layer < self.num_dense_layers:
            return self.attention_parameters + 3 * self.hidden_size * self.dense_size
        router = self.hidden_size * self.num_experts
        return self.attention_parameters + router + 3 * self.hidden_size * self.shared_size

    @property
    def expert_parameters(self) -> int:
        """Of the routed experts of one layer."""
        return 3 * self.num_experts * self.hidden_size * self.expert_size

    @property
    def num_parameters(self) -> int:
        """Of the whole model, without biases of a router."""
        layers = sum(self.dense_parameters(layer) for layer in range(self.num_layers))
        experts = (self.num_layers - self.num_dense_layers) * self.expert_parameters
        ends = self.vocab_size * self.hidden_size * (2 - self.tied_embeddings)
        return layers + experts + ends + self.hidden_size


@dataclass(frozen=True, kw_only=True)
class Device:
    """An accelerator."""

    flops_per_second: float
    """Peak of matrix products."""
    memory_bytes: float
    """Its memory."""
    memory_bytes_per_second: float
    """Rate of its memory."""
    kernel_seconds: float = 0.0
    """What starting a matrix product takes."""
    efficiency: tuple[tuple[float, ...], ...] = ((1.0, 1.0),)
    """Pairs of the FLOPs of one matrix product and the share of the peak that it reaches;
    in between by the logarithm of the FLOPs."""

    def __post_init__(self) -> None:
        check_units(self)
        flops = [pair[0] for pair in self.efficiency if len(pair) == 2]
        if len(flops) != len(self.efficiency) or not flops or flops != sorted(set(flops)):
            raise ValueError(
                "efficiency must be pairs of rising floating-point operations and a "
                f"share, not {self.efficiency}"
            )
        if flops[0] <= 0 or not all(0 < pair[1] <= 1 for pair in self.efficiency):
            raise ValueError(
                f"efficiency={self.efficiency}: FLOPs must be positive, and shares of "
                "the peak above 0 and at most 1"
            )

    def product_seconds(
        self, rows: np.ndarray, width: float, depth: float, itemsize: int
    ) -> np.ndarray:
        """Time of products [rows, depth] x [depth, width], each alone; 0 without rows.

        Args:
            rows: of each product.
            itemsize: bytes of a number.
        """
        rows = np.asarray(rows, dtype=np.float64)
        flops = 2 * rows * width * depth
        at, share = np.array(self.efficiency).T
        reached = np.interp(np.log(np.maximum(flops, 1.0)), np.log(at), share)
        moved = itemsize * (rows * depth + depth * width + rows * width)
        busy = flops / (self.flops_per_second * reached)
        seconds = self.kernel_seconds + np.maximum(busy, moved / self.memory_bytes_per_second)
        return np.where(rows > 0, seconds, 0.0)

    def feed_forward_seconds(
        self, rows: np.ndarray, hidden: float, inner: float, itemsize: int
    ) -> np.ndarray:
        """Time of the products of gated feed-forwards: gate and up as one, and down.

        Args:
            rows: of each feed-forward.
            hidden, inner: its widths.
            itemsize: bytes of a number.
        """
        up = self.product_seconds(rows, 2 * inner, hidden, itemsize)
        return up + self.product_seconds(rows, hidden, inner, itemsize)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes of equal devices."""

    name: str
    """Shown in tables."""
    num_nodes: int
    """Nodes."""
    devices_per_node: int
    """Devices of a node."""
    device: Device
    """Each of them."""
    links: Links
    """What joins them."""

    def __post_init__(self) -> None:
        check_units(self)

    @property
    def num_devices(self) -> int:
        """Of all nodes."""
        return self.num_nodes * self.devices_per_node


class Ranks(NamedTuple):
    """A group of ranks at equal distances."""

    size: int
    """Ranks."""
    per_node: int
    """How many of them stand on one node."""
    groups_per_node: int
    """Such groups that have ranks on the same node."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How training is divided. Ranks are numbered tensor first, then data, then pipeline; those of
    experts are numbered expert-tensor first, then expert, inside tensor x data."""

    tensor: int = 1
    """Ranks that share attention and dense layers (TP)."""
    pipeline: int = 1
    """Stages (PP)."""
    data: int = 1
    """Replicas (DP)."""
    expert: int = 1
    """Ranks that the experts of a layer are spread over (EP)."""
    expert_tensor: int = 1
    """Ranks that share one expert."""
    sequence_length: int = 4096
    """Tokens of a sequence."""
    sequences: int = 1
    """Sequences of a micro-batch on each replica."""
    micro_batches: int = 1
    """Micro-batches of a step on each replica."""
    sequence_parallel: bool = True
    """Whether tensor ranks divide the tokens outside of attention; else all hold all of them."""
    recompute: bool = False
    """Whether a layer keeps its input alone and is computed again in the backward pass."""
    shard_optimizer: bool = True
    """Whether replicas divide the optimizer's state among them."""
    overlapped_reduction_share: float = 0.0
    """Share of the reduction of gradients that is hidden behind the backward pass."""
    weight_bytes: int = 2
    """Of a parameter, as it is computed with."""
    gradient_bytes: int = 4
    """Of a parameter's gradient."""
    optimizer_bytes: int = zero_or_more(12)
    """Of a parameter's optimizer state: a float32 copy and two moments."""
    activation_bytes: int = 2
    """Of a number of an activation, as it is kept and sent."""
    norm_copies: int = 2
    """Tensors of the hidden size that a normalization keeps: 2 fused, 3 as transformers does it."""

    def __post_init__(self) -> None:
        check_units(self)
        block = self.expert * self.expert_tensor
        if (self.tensor * self.data) % block:
            raise ValueError(
                f"expert={self.expert} x expert_tensor={self.expert_tensor} must divide tensor x "
                f"data = {self.tensor * self.data}"
            )

    @property
    def num_devices(self) -> int:
        """Devices that it takes."""
        return self.tensor * self.pipeline * self.data

    @property
    def tokens(self) -> int:
        """Of a micro-batch on a replica."""
        return self.sequence_length * self.sequences

    @property
    def expert_data(self) -> int:
        """Replicas of each expert."""
        return self.tensor * self.data // (self.expert * self.expert_tensor)

    @property
    def name(self) -> str:
        """Such as TP4 PP4 DP2 EP2."""
        parts = [("TP", self.tensor), ("PP", self.pipeline), ("DP", self.data), ("EP", self.expert)]
        if self.expert_tensor > 1:
            parts.append(("ETP", self.expert_tensor))
        return " ".join(f"{name}{size}" for name, size in parts)

    def check(self, model: ModelShape, cluster: Cluster) -> None:
        """Refuse a model or a cluster that cannot be divided so.

        Raises:
            ValueError: says what does not divide what.
        """
        for what, value, by, parts in (
            ("num_experts", model.num_experts, "expert", self.expert),
            ("num_heads", model.num_heads, "tensor", self.tensor),
            ("expert_size", model.expert_size, "expert_tensor", self.expert_tensor),
        ):
            if value % parts:
                raise ValueError(f"{what}={value} is not a multiple of {by}={parts}")
        if self.pipeline > model.num_layers:
            raise ValueError(
                f"pipeline={self.pipeline} has more stages than {model.num_layers} layers"
            )
        if self.num_devices > cluster.num_devices:
            raise ValueError(
                f"{self.name} takes {self.num_devices} devices; {cluster.name} has "
                f"{cluster.num_devices}"
            )

    def ranks(self, kind: str, devices_per_node: int) -> Ranks:
        """The group of a kind: tensor, data, expert, expert_tensor or expert_data."""
        block = self.expert * self.expert_tensor
        size, distance = {
            "tensor": (self.tensor, 1),
            "data": (self.data, self.tensor),
            "expert_tensor": (self.expert_tensor, 1),
            "expert": (self.expert, self.expert_tensor),
            "expert_data": (self.expert_data, block),
        }[kind]
        per_node = max(1, min(size, devices_per_node // distance))
        on_node = min(devices_per_node, self.num_devices)
        return Ranks(size, per_node, math.ceil(on_node / per_node))
