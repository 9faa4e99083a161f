"""What a network is made of: parameters, buffers and layers that cannot be trained or stored are refused."""

from __future__ import annotations

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from digitdist.errors import UserError, in_one_line
from digitdist.model_state import load_model_state, model_state, transient_buffers
from digitdist.optim import TRAINABLE


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def check_parts(model: nn.Module, mode: str) -> None:
    """Refuses parameters, buffers and layers that cannot be trained or stored.

    Raises:
        UserError: naming the first one.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise UserError(f"the parameter {name} still has no shape after a forward pass; use its module in every forward")
        if parameter.requires_grad and parameter.dtype not in TRAINABLE:
            raise UserError(
                f"the parameter {name} is {parameter.dtype}; what is trained must be float32, float64, bfloat16 or float16:"
                " keep complex numbers as real ones (torch.view_as_real) and make them complex in forward"
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("there is nothing to train: the model has no parameter with requires_grad=True")
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and mode == "exact" and module.running_mean is not None and module.momentum is None:
            raise UserError(f"sync.mode=exact needs BatchNorm with a momentum, and {name} has momentum=None; give it one")
        if isinstance(module, nn.SyncBatchNorm) and mode != "ddp":
            raise UserError(
                f"{name} is a SyncBatchNorm, with which ranks meet in each forward pass; with sync.mode={mode} use BatchNorm"
            )
    for name, tensor in (model_state(model) | transient_buffers(model)).items():
        problem = _storing_problem(tensor)
        if problem:
            raise UserError(f"{name} cannot be stored in a checkpoint: {problem}; keep it as a plain dense tensor")
    try:
        load_model_state(model, model_state(model))  # or a run could not be resumed
    except Exception as error:  # a user's network may raise anything
        raise UserError(f"the model does not take its own state_dict back, to be resumed: {in_one_line(error)}") from error


def check_scalable(model: nn.Module, clip_norm: float) -> None:
    """Refuses parameters whose gradients torch's `GradScaler` does not scale back, as training in fp16 needs.

    It has no CUDA kernel for bfloat16, and divides no float16 before it is clipped.

    Raises:
        UserError: naming the first one.
    """
    refused = {torch.bfloat16, torch.float16} if clip_norm else {torch.bfloat16}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in refused:
            raise UserError(
                f"the parameter {name} is {parameter.dtype}, whose gradient torch does not scale back in fp16"
                f"{f' with optim.clip_norm={clip_norm:g}' if parameter.dtype == torch.float16 else ''}; keep parameters in"
                " float32, with which layers compute in float16 all the same, or set train.precision=fp32"
            )


def _storing_problem(tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return f"it is {tensor.layout} on {tensor.device}"
    try:
        safetensors.torch.save({"": torch.empty(0, dtype=tensor.dtype)})
    except Exception:  # safetensors raises several kinds
        return f"safetensors holds no {tensor.dtype}"
    return ""
