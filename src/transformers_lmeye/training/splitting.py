"""Training with a model's parameters split over processes by FSDP2, and checkpoints that any number of them reads."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, str_to_bool
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..modeling.backbones import copy_tensors


def set_up_fsdp(accelerator: Accelerator) -> bool:
    """
    Whether a run uses FSDP. On CPUs, where accelerate passes over the setting without a word, it is taken up here.

    Raises:
        ValueError: it is FSDP's first version.
    """
    state = accelerator.state
    asked = bool(str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")))
    if asked and state.distributed_type == DistributedType.MULTI_CPU:
        plugin = FullyShardedDataParallelPlugin()  # as the environment says
        if state.mixed_precision != "no":
            plugin.set_mixed_precision(state.mixed_precision)
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            "FSDP's first version flattens parameters, trained and frozen ones of several types together: set "
            "fsdp_version: 2 in accelerate's configuration."
        )
    return plugin is not None


def check_can_be_split(model: nn.Module) -> None:
    """
    Refuses what accelerate cannot split with FSDP2.

    Raises:
        ValueError: more modules than word embeddings and head share one table, as in most encoder-decoders.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    others = [
        name
        for name, module in model.named_modules()
        if module not in (table, head) and any(part is table.weight for part in module._parameters.values())
    ]
    if others:
        raise ValueError(
            f"FSDP2 splits modules, and the word embeddings are also those of {', '.join(others)}: train this "
            "language model with DDP (examples/accelerate/ddp_8gpu.yaml), or quantised."
        )


def register_forward_methods(model: nn.Module) -> None:
    """Has the methods that run parts of a split model gather what they use, as its forward pass does."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    for name in ("get_image_features", "perceive"):  # the Trainer has registered `generate`
        register_fsdp_forward_method(model, name)


def register_trained_parameters(model: nn.Module) -> None:
    """Has ZeRO-3 gather what trains of the IPN for the whole forward pass: its vectors are used by no module's own,
    and a loss that a batch does not reach through them takes them in with a gradient of zero."""
    import deepspeed

    for name, parameter in model.ipn.named_parameters():
        if parameter.requires_grad or "." not in name:
            deepspeed.zero.register_external_parameter(model, parameter)


def gathered_state_dict(model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """
    The tensors that a checkpoint holds, whole and on the CPU: the IPN's and those of an adapter of the language model,
    or everything where the backbones have no source to be loaded from again.

    Args:
        model: split; every process calls.
        keep: whether this process is to get them; others get an empty dictionary.
    """
    adapters = list(getattr(model.language_model, "peft_config", None) or {})
    tensors = {}
    for name, tensor in model.state_dict().items():
        of_adapter = name.startswith("language_model.") and any(part in adapters for part in name.split("."))
        if model.config.backbones is not None and not (name.startswith("ipn.") or of_adapter):
            continue
        whole = _whole(tensor)
        if keep:
            tensors[name] = whole
    return tensors


def load_split_model(model: nn.Module, checkpoint: str | Path) -> SimpleNamespace:
    """
    Loads the tensors of a checkpoint's `model.safetensors` into a split model.

    Returns:
        `missing_keys` and `unexpected_keys`, as `nn.Module.load_state_dict` does.
    """
    folder = Path(checkpoint)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    files = [SAFE_WEIGHTS_NAME]
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    own, found = model.state_dict(), set()
    unexpected = []
    for file in files:
        tensors = load_file(folder / file)
        found |= tensors.keys()
        unexpected += sorted(tensors.keys() - own.keys())
        copy_tensors({name: tensor for name, tensor in tensors.items() if name in own}, own)
    return SimpleNamespace(missing_keys=sorted(own.keys() - found), unexpected_keys=unexpected)


def gathered_optimizer_states(optimizer: Optimizer) -> dict[str, Any]:
    """What `optimizer.state_dict()` would be if one process held every parameter; every process calls."""
    states = optimizer.state_dict()
    whole = {
        index: {name: _whole(value) if isinstance(value, torch.Tensor) else value for name, value in state.items()}
        for index, state in states["state"].items()
    }
    return {**states, "state": whole}


def load_optimizer_states(optimizer: Optimizer, states: dict[str, Any]) -> None:
    """Loads the states of whole parameters, each process taking its part."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = {}
    for index, state in states["state"].items():
        parameter = parameters[index]
        own[index] = {
            name: distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
            if isinstance(value, torch.Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape
            else value
            for name, value in state.items()
        }
    optimizer.load_state_dict({**states, "state": own})


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


__all__ = [
    "check_can_be_split",
    "gathered_optimizer_states",
    "gathered_state_dict",
    "load_optimizer_states",
    "load_split_model",
    "register_forward_methods",
    "register_trained_parameters",
    "set_up_fsdp",
]
