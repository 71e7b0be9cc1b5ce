"""Local dispatch: rows are gathered to their expert and summed back in token order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from etr.moe.dispatch.base import Dispatcher, pairs_per_token
from etr.moe.exchange import Traffic
from etr.moe.experts import ExpertBackend, ExpertParams
from etr.moe.ranks import ExpertParallel
from etr.moe.routing import Routing, Selection
from etr.moe.rows import DispatchHandle, GatherRows, SumRows


@dataclass(frozen=True, kw_only=True)
class Permute(Dispatcher):
    """Dispatch on one rank: no communication."""

    name = "permute"
    summary = "one rank holds every expert: nothing travels"
    needs_ranks = False

    @property
    def padded(self) -> bool:
        return True

    def check(self, parallel: ExpertParallel) -> None:
        if parallel.expert_peers.size > 1:
            raise ValueError(
                f"dispatch='permute' moves no rows, and the experts are spread over "
                f"{parallel.expert_peers.size} ranks; use 'auto' or 'all_to_all'"
            )

    def run(
        self,
        x: Tensor,
        routing: Routing,
        selection: Selection,
        backend: ExpertBackend,
        params: ExpertParams,
        traffic: Traffic | None = None,
    ) -> Tensor:
        """Dispatch, experts and combine in one, [T, H].

        The backend gathers the rows itself, so that neither they nor the experts' outputs are
        kept for the backward pass. The same as `dispatch`, ``backend.run`` and `combine`.

        Args:
            x: tokens, float [T, H].
            routing, selection: the pairs and what is kept of them.
            backend: how the experts run.
            params: their weights.
            traffic: not used, nothing is sent.
        """
        handle = self.plan(routing, selection, padded=backend.padded)
        return backend.run_routed(x, handle, params)

    def plan(self, routing: Routing, selection: Selection, *, padded: bool) -> DispatchHandle:
        """Where every kept pair's row stands.

        Args:
            routing, selection: the pairs and what is kept of them.
            padded: C = ``selection.buffer_size`` rows an expert, of static shape and without a
                host synchronisation; otherwise exactly the kept rows, sorted by expert, which
                reads their number R from the device once.
        """
        order, token, weight = selection.order, routing.token, selection.combine_weight
        if padded:
            place = torch.arange(selection.buffer_size, device=order.device)
            used = place < selection.num_tokens_per_expert[:, None]
            slot = torch.where(used, selection.bounds[:-1, None] + place, len(order)).flatten()
            pair = _and(order, len(order))[slot]  # an empty row has one of its own
            token = _and(token, routing.num_tokens)
            weight = F.pad(weight, (0, 1))
        else:
            pair = selection.pairs_by_expert()
        token_of_row = token.index_select(0, pair)
        _, rows_by_token = pair.sort()  # pairs are token-major
        if selection.all_kept and not padded:  # as many rows for every token
            width = pairs_per_token(routing)
            start = torch.arange(0, len(order) + 1, width, device=order.device)
        else:
            number = torch.arange(routing.num_tokens + 1, device=order.device)
            start = torch.searchsorted(token_of_row.index_select(0, rows_by_token), number)
        return DispatchHandle(
            token_of_row=token_of_row,
            # Its backward pass costs less than that of indexing.
            weight_of_row=weight.gather(0, pair),
            rows_by_token=rows_by_token,
            start_of_token=start,
            num_tokens_per_expert=selection.num_tokens_per_expert,
            num_tokens=routing.num_tokens,
            padded=padded,
        )

    def dispatch(
        self, x: Tensor, routing: Routing, selection: Selection, *, padded: bool
    ) -> tuple[Tensor, DispatchHandle]:
        """Bring kept tokens to their experts: rows [E, C, H] if padded, else [R, H]; see `plan`."""
        handle = self.plan(routing, selection, padded=padded)
        rows = GatherRows.apply(x, handle.token_of_row, handle.rows_by_token, handle.start_of_token)
        if padded:
            rows = rows.view(routing.num_experts, selection.buffer_size, x.shape[1])
        return rows, handle

    def combine(self, rows: Tensor, handle: DispatchHandle) -> Tensor:
        """Weighted sum of expert outputs in token order, [T, H]; 0 for a token without rows."""
        return SumRows.apply(
            rows.reshape(-1, rows.shape[-1]),
            handle.weight_of_row.to(rows.dtype),
            handle.token_of_row,
            handle.rows_by_token,
            handle.start_of_token,
        )


def _and(values: Tensor, last: int) -> Tensor:
    """Values and one more; `pad` would compile anew for each number that it is given."""
    return torch.cat((values, values.new_full((1,), last)))
