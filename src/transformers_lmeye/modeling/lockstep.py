"""Processes that share out one model's parameters, kept in step.

Where parameters are split over processes (FSDP2, ZeRO-3), every call of a part gathers that part from all of them,
again in the backward pass, and a process whose batch asks fewer requests or shows no picture would leave the others
waiting for ever. So before each call of a split part the processes agree on the next one, and a process that has no
such call of its own makes one over a dummy whose gradient is zero. Whole models agree on nothing and pay nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Call(IntEnum):
    """Calls of a model's parts. Of those that processes wait for at the same time, the highest is made first."""

    NONE = 0  # a process is through with its batch
    DECODE = 1  # the language model, or an encoder-decoder's decoder
    ENCODE = 2
    LOOK_UP = 3  # the interaction
    MAP = 4  # the static mapping
    EMBED = 5
    SEE = 6  # the vision tower, and the Q-Former


# What these dummies look like depends on the pictures of the others.
_SHOWN = (Call.SEE, Call.MAP, Call.LOOK_UP)


def several_processes() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_split(module: nn.Module) -> bool:
    """Whether calls of parts inside `module` gather parameters from other processes."""
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(part, FSDPModule) for part in module.modules()):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())  # ZeRO-3


class Lockstep:
    """
    What one forward pass of this process has agreed with the others.

    Args:
        calls: those that gather parameters; others are made whenever a process wants to.
        make_dummy: makes a call of a kind over a dummy, gradients recorded if its second argument says so, and returns
            the tensors that came out. The third is what another process shows, for the calls that look at pictures.
        device: on which processes communicate.
    """

    def __init__(
        self,
        calls: frozenset[Call],
        make_dummy: Callable[[Call, bool, dict[str, torch.Tensor] | None], list[torch.Tensor]],
        device: torch.device,
    ):
        self._calls = calls
        self._make_dummy = make_dummy
        self._device = device
        self._in_dummy = False
        self._zeros: list[torch.Tensor] = []

    def wait(self, call: Call, records: bool = False, shown: dict[str, torch.Tensor | None] | None = None) -> bool:
        """
        Waits until it is the turn of a call that this process is about to make.

        Args:
            call: its kind.
            records: whether gradients will pass through it.
            shown: for calls that look at pictures, what they are given.

        Returns:
            `bool`: whether gradients have to pass through it, because they do in another process.
        """
        if self._in_dummy or call not in self._calls:
            return records
        while True:
            agreed, recorded = self._agree(call, records, shown)
            if agreed == call:
                return recorded

    def finish(self) -> None:
        """Goes on making dummies until all processes are through with their batches."""
        while self._agree(Call.NONE, False, None)[0]:
            pass

    def zero(self) -> torch.Tensor | None:
        """Zero, through which the backward pass reaches every dummy; `None` where it has to reach none."""
        return torch.stack(self._zeros).sum() if self._zeros else None

    def _agree(self, call: Call, records: bool, shown: dict[str, torch.Tensor | None] | None) -> tuple[Call, bool]:
        """The next call, and whether gradients pass through it; made over a dummy unless it is this process's own."""
        own = 2 * call + records
        range_of_all = torch.tensor([own, -2 * int(call)], device=self._device)
        dist.all_reduce(range_of_all, op=dist.ReduceOp.MAX)
        highest, lowest = range_of_all.tolist()
        agreed, recorded = Call(highest // 2), bool(highest % 2)
        example = None
        if agreed in _SHOWN and 2 * agreed != -lowest:
            example = self._example(shown if agreed == call else None)
        if agreed not in (call, Call.NONE):
            self._in_dummy = True
            try:
                outputs = self._make_dummy(agreed, recorded, example)
            finally:
                self._in_dummy = False
            # Order matters: the engine runs backward what was called last, so dummies keep their place in the line.
            self._zeros += [0.0 * output.float().sum() for output in outputs if output.requires_grad]
        return agreed, recorded

    def _example(self, shown: dict[str, torch.Tensor | None] | None) -> dict[str, torch.Tensor]:
        """One picture like those of the first process that has some: its masks and sizes, and zeros."""
        own = None
        if shown is not None:
            first = {name: tensor[:1] for name, tensor in shown.items() if tensor is not None}
            own = {
                name: (tensor.shape, tensor.dtype) if tensor.is_floating_point() else tensor.cpu()
                for name, tensor in first.items()
            }
        of_all: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_all, own)
        found = next(example for example in of_all if example is not None)
        return {
            name: part.to(self._device)
            if isinstance(part, torch.Tensor)
            else torch.zeros(part[0], dtype=part[1], device=self._device)
            for name, part in found.items()
        }


@contextmanager
def kept_in_step(model: Any) -> Iterator[Lockstep | None]:
    """The block in which a model's processes agree on their calls, where its parameters are split over them."""
    calls = _split_calls(model) if model.lockstep is None and several_processes() else frozenset()
    if not calls:
        yield None
        return
    model.find_out_how_to_read()  # what is found by trying runs the language model: in all processes, or in none
    lockstep = Lockstep(calls, model.make_dummy_call, model.ipn.image_token.device)
    model.lockstep = lockstep
    try:
        yield lockstep
        lockstep.finish()
    finally:
        model.lockstep = None


def in_step(forward: Callable[..., Any]) -> Callable[..., Any]:
    """
    A model's forward pass, kept in step with those of other processes, in which all trained parameters have a part.

    Gradients are reduced over processes, so a parameter that a batch does not reach has a gradient of zero, not none.
    """

    @wraps(forward)
    def run(self, *args: Any, **kwargs: Any) -> Any:
        with kept_in_step(self) as lockstep:
            outputs = forward(self, *args, **kwargs)
        if not torch.is_grad_enabled():
            return outputs
        name = next(name for name in ("loss", "logits", "last_hidden_state") if outputs.get(name) is not None)
        zeros = [] if lockstep is None or lockstep.zero() is None else [lockstep.zero()]
        if self.training and (several_processes() or not outputs[name].requires_grad):
            zeros += [0.0 * part.sum() for part in self.parameters() if part.requires_grad and _is_whole(part)]
        for zero in zeros:
            outputs[name] = outputs[name] + zero.to(outputs[name])
        return outputs

    return run


def _split_calls(model: Any) -> frozenset[Call]:
    vision = model.vision_tower if model.qformer is None else nn.ModuleList([model.vision_tower, model.qformer])
    calls: list[Call] = []
    for part, of_part in (
        (vision, (Call.SEE,)),
        (model.language_model, (Call.EMBED, Call.ENCODE, Call.DECODE)),
        (model.ipn, (Call.MAP, Call.LOOK_UP)),
    ):
        if is_split(part):
            calls += of_part
    return frozenset(calls)


def _is_whole(parameter: nn.Parameter) -> bool:
    """Whether this process holds a whole parameter at the moment; those of split parts take part by calls."""
    from torch.distributed.tensor import DTensor

    return not isinstance(parameter, DTensor) and parameter.numel() == getattr(
        parameter, "ds_numel", parameter.numel()
    )


__all__ = ["Call", "Lockstep", "in_step", "is_split", "kept_in_step", "several_processes"]
