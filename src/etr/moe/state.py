"""State outside the gradient: small global float32 buffers that every rank holds in full."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from etr.moe.notice import warn


class GlobalState(nn.Module):
    """A module whose registered state keeps its dtype and never holds uninitialised memory.

    - ``.to(dtype)`` and ``.half()`` move the state but do not convert it: thresholds rounded to
      bfloat16 would no longer keep the calibrated share.
    - `reset_state` writes the initial values; a model's weight initialisation must call it after
      a meta-device start, or for a checkpoint that lacks the state.
    - Loading a state dict without the state keeps the initial values and warns, unless the layer's
      weights are not in it either (an adapter's): then nothing changes.
    - State changes in `after_step` alone, never in a forward.
    """

    def __init__(self) -> None:
        super().__init__()
        self._initial: dict[str, float] = {}
        self._read: dict[str, Callable[[float], Any]] = {}
        self._known: dict[str, Any] = {}
        self._written: dict[str, tuple[int, int] | None] = {}

    def register_state(
        self,
        name: str,
        shape: tuple[int, ...],
        initial: float,
        dtype: torch.dtype = torch.float32,
        *,
        read: Callable[[float], Any] | None = None,
    ) -> None:
        """Add a persistent buffer of `shape` filled with `initial`.

        Args:
            read: for a scalar whose value the host needs: what `on_host` makes of it.
        """
        self._initial[name] = initial
        self.register_buffer(name, torch.full(shape, initial, dtype=dtype))
        if read is not None:
            self._read[name] = read
            self.set_on_host(name, read(initial))

    @property
    def has_state(self) -> bool:
        """Whether there is any."""
        return bool(self._initial)

    def on_host(self, name: str) -> Any:
        """What the host knows of a scalar state: never older than the state itself.

        A CPU's value is read anew each time, in a microsecond. Reading another device's waits for
        it, so that is done only where the buffer's version or place says that it was written to.
        Writes that leave no such trace (through `.data`, or by a collective in place) are seen
        there after the next optimizer step, load, or change of mode. Compiled code takes the
        value for a constant, and it too sees a write of any other kind only then.
        """
        if not torch.compiler.is_compiling():
            written = _trace(self._buffers[name])
            if written is None or written != self._written[name]:
                self._read_state(name)
        return self._known[name]

    def set_on_host(self, name: str, known: Any) -> None:
        """Say what a state that has just been written is to the host, to spare it the reading."""
        self._known[name] = known
        self._written[name] = _trace(self._buffers[name])

    def _read_state(self, name: str) -> None:
        value = self._buffers[name]
        if value is not None and not value.is_meta:  # there is nothing to read yet
            self.set_on_host(name, self._read[name](float(value)))

    @torch.no_grad()
    def reset_state(self) -> None:
        """Write the initial values in place."""
        for name, initial in self._initial.items():
            self.get_buffer(name).fill_(initial)
        self.state_changed()

    def initial_state(self) -> dict[str, Tensor]:
        """The initial values by name, on the CPU, wherever the module itself is."""
        return {
            name: torch.full_like(self.get_buffer(name), initial, device="cpu")
            for name, initial in self._initial.items()
        }

    def state_changed(self) -> None:
        """Read what the host needs anew; for writes that `on_host` cannot see by itself."""
        for name in self._read:
            self._read_state(name)

    def train(self, mode: bool = True) -> GlobalState:
        # Loaders that assign buffers directly run no hook, but they do set the mode.
        super().train(mode)
        self.state_changed()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GlobalState:
        before = {name: self.get_buffer(name) for name in self._initial}
        super()._apply(fn, recurse)
        if any(old.is_meta and not self.get_buffer(name).is_meta for name, old in before.items()):
            self.reset_state()  # `to_empty` leaves uninitialised memory
        for name, old in before.items():
            new = self.get_buffer(name)
            if new.dtype != old.dtype:
                self._buffers[name] = (
                    torch.empty_like(old, device=new.device)
                    if old.is_meta or new.is_meta
                    else old.to(new.device)
                )
        self.state_changed()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        missing = [name for name in self._initial if prefix + name not in state_dict]
        if missing:
            warn(
                f"checkpoint has no routing state {', '.join(missing)}: starting from the initial "
                "values; calibrate before evaluating with thresholds"
            )
            self.reset_state()
            state_dict = {**state_dict, **{prefix + n: self.get_buffer(n) for n in missing}}
        # With assign=True a checkpoint cast to half precision would bring its dtype along.
        dtypes = {prefix + name: self.get_buffer(name).dtype for name in self._initial}
        state_dict = {
            name: value.to(dtypes[name]) if name in dtypes else value
            for name, value in state_dict.items()
        }
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.state_changed()


def _trace(value: Tensor | None) -> tuple[int, int] | None:
    """Changes when a tensor is written to or replaced; None where only its value tells."""
    if value is None or value.device.type == "cpu" or value.is_inference():
        return None
    return value.data_ptr(), value._version


def keep_state(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any, weights: frozenset[str]
) -> None:
    """Let the state inside `module` be, while a state dict without the module's weights is loaded.

    A hook for `register_load_state_dict_pre_hook`. Adapters' weights come that way.

    Args:
        weights: their names, each the last part of a key.
    """
    if any(key.startswith(prefix) and key.rpartition(".")[2] in weights for key in state_dict):
        return
    for path, child in module.named_modules(prefix=prefix.removesuffix(".")):
        if isinstance(child, GlobalState):
            for name, value in child.named_buffers(prefix=path, recurse=False):
                state_dict.setdefault(name, value)


def reset_states(module: nn.Module) -> None:
    """Reset every `GlobalState` inside `module` (itself included)."""
    for child in module.modules():
        if isinstance(child, GlobalState):
            child.reset_state()
