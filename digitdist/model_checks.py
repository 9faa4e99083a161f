"""What a network does when it is trained, found out on copies of it before a run exists; what cannot be had is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from digitdist.checkpoint import weights_sha256
from digitdist.data import AnySet, DataSetInfo, normalise, seed_generators
from digitdist.distributed import generators_kept
from digitdist.errors import UserError, in_one_line
from digitdist.model_state import SavedBuffers, load_model_state, model_state, transient_buffers
from digitdist.models import output_problem
from digitdist.optim import TRAINABLE

CPU = torch.device("cpu")  # where trials are
FEW_IMAGES = 4  # of a trial, where the network takes so few
BUILT_IN_TWO_WAYS = (
    "the initial values of {name} are not a function of the seed: two builds of the network differ in them; draw them from"
    " torch, numpy.random or random, not from a generator of your own (or, with sync.mode=ddp, set sync.check_every=0: rank 0's"
    " are taken)"
)
NOT_IN_EXACT = "; sync.mode=exact can have that in buffers alone: keep it in one (register_buffer), or choose another sync.mode"

Build = Callable[[], nn.Module]
Images = Callable[[int], tuple[Tensor, Tensor, int]]


@dataclass(frozen=True)
class Traits:
    """What trials have shown of a network.

    `layout_problem`: why it does not take channels-last memory, "" where it does. `one_graph`: whether each gradient comes
    through the graph of the loss, and none from a backward pass inside the backward pass.
    """

    layout_problem: str = ""
    one_graph: bool = True

    @property
    def layout(self) -> torch.memory_format:
        """The memory format that all of its operations take."""
        return torch.contiguous_format if self.layout_problem else torch.channels_last


def first_images(images: AnySet, info: DataSetInfo, count: int) -> tuple[Tensor, Tensor, int]:
    """The first `count` of `images`, or all where there are fewer, for a trial: pixels, labels, and the number of classes."""
    batch = images.read(torch.arange(min(count, len(images))))
    return normalise(batch.images, info), batch.labels, info.num_classes


def inspect_model(
    build: Build, images: Images, smallest: int, largest: int, bf16: bool, mode: str, repeatable: bool = True
) -> Traits:
    """Tries the network that `build` makes on images with their labels; the generators are left as they were.

    ``images(n)`` gives pixels, float32 [n, c, h, w], and labels, int64 [n], of n training images, and the number of classes;
    the smallest micro-batch of the run has `smallest` images, a global batch `largest`; `mode` is `sync.mode`; with
    `repeatable` two builds must be equal.

    Raises:
        UserError: naming what cannot be trained, stored or repeated, and the way out.
    """
    with generators_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training says them again
        model = build()
        check_parts(model, mode)
        if repeatable:
            _check_repeatable(model_state(model), model_state(build()))
        found = None
        for count in sorted({min(FEW_IMAGES, smallest), smallest, largest}):
            try:
                found = _trial(build(), *images(count), bf16, mode)
                break
            except UserError:
                raise
            except Exception as error:  # a user's network may raise anything
                problem = in_one_line(error)
        if found is None:
            raise UserError(f"the model cannot be trained: {problem}")
        if count > smallest:
            raise UserError(
                f"the model cannot be trained on {smallest} image{'s' if smallest > 1 else ''} at once ({problem}), which the"
                " smallest micro-batches here have; set a larger data.batch_size, a smaller sync.shards or train.accumulate, or"
                " start fewer processes"
            )
        return Traits(layout_problem(build, *images(count), bf16, found.logits), found.one_graph)


def layout_problem(
    build: Build, pixels: Tensor, labels: Tensor, num_classes: int, bf16: bool = False, wanted: Tensor | None = None
) -> str:
    """Why the network that `build` makes does not take channels-last memory, in one line; "" where it does.

    `wanted`: its logits for `pixels` in contiguous memory, if they are known.
    """
    with generators_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build()
        if not any(tensor.dim() in (4, 5) for tensor in (*model.parameters(), *model.buffers())):
            return ""  # where there is nothing to lay out otherwise
        try:
            logits = _trial(model.to(memory_format=torch.channels_last), pixels, labels, num_classes, bf16).logits
            wanted = _trial(build(), pixels, labels, num_classes, bf16).logits if wanted is None else wanted
        except Exception as error:  # a user's network may raise anything
            return in_one_line(error)
        same = torch.allclose(logits, wanted, rtol=0, atol=0.02 * float(wanted.abs().max()) + 1e-6)
        return "" if same else "its logits differ in that layout"


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


def _check_repeatable(state: dict[str, Tensor], again: dict[str, Tensor]) -> None:
    for name in state.keys() & again.keys():
        if weights_sha256({name: state[name]}) != weights_sha256({name: again[name]}):
            raise UserError(BUILT_IN_TWO_WAYS.format(name=name))


@dataclass(frozen=True)
class _Outcome:
    logits: Tensor
    one_graph: bool


def _trial(model: nn.Module, pixels: Tensor, labels: Tensor, num_classes: int, bf16: bool, mode: str = "") -> _Outcome:
    """Two training steps without an update, and an evaluation between them; for ``exact``, the first step once more."""
    shapes, before, saved = _shapes(model), _outside_buffers(model), SavedBuffers(model)
    first, one_graph = _train_once(model, pixels, labels, num_classes, bf16)
    logits = _evaluate_once(model, pixels, num_classes, bf16)
    one_graph &= _train_once(model, pixels, labels, num_classes, bf16)[1]
    changed = sorted(name for name, shape in (_shapes(model).items() ^ shapes.items()))
    if changed:
        raise UserError(
            f"{changed[0]} changes its shape or dtype in forward, or is made there; make it in __init__, at full size"
        )
    if mode == "exact":
        now = _outside_buffers(model)
        for name in sorted(name for name in before if before[name] != now.get(name)):
            raise UserError(f"{name} changes in forward{NOT_IN_EXACT}")
        saved.restore()
        if not torch.equal(_train_once(model, pixels, labels, num_classes, bf16)[0], first):
            raise UserError(
                "a forward pass gives other logits for the same images, seed, weights and buffers: the model keeps something"
                f" from one to the next{NOT_IN_EXACT}"
            )
    return _Outcome(logits, one_graph)


def _outside_buffers(model: nn.Module) -> dict[str, str]:
    """A hash of each parameter and each extra state of `model`."""
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return {name: weights_sha256({name: tensor}) for name, tensor in model_state(model).items() if name not in buffers}


def _train_once(model: nn.Module, pixels: Tensor, labels: Tensor, num_classes: int, bf16: bool) -> tuple[Tensor, bool]:
    """One forward and backward pass: its logits, and whether all gradients came through the graph of the loss."""
    model.train().zero_grad()
    seed_generators(0, CPU)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(pixels)
        _check_output(logits, len(pixels), num_classes, "in training")
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
    if not loss.requires_grad:
        raise UserError("there is nothing to train: no parameter with requires_grad=True takes part in the logits")
    reached = _leaves(loss)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in gradients.items():
        if gradient.layout != torch.strided:
            raise UserError(f"the gradient of {name} is {gradient.layout}; let its layer give a dense one (sparse=False)")
    return logits.detach().clone(), all(id(p) in reached for name, p in model.named_parameters() if name in gradients)


def _evaluate_once(model: nn.Module, pixels: Tensor, num_classes: int, bf16: bool) -> Tensor:
    """The logits in evaluation, float32; what it writes into buffers is undone, as in an evaluation."""
    model.eval()
    seed_generators(0, CPU)
    saved = SavedBuffers(model)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(pixels)
        _check_output(logits, len(pixels), num_classes, "in evaluation")
    saved.restore()
    return logits.float()


def _check_output(logits: Tensor, num_images: int, num_classes: int, when: str) -> None:
    problem = output_problem(logits, num_images, num_classes)
    if problem:
        raise UserError(f"the model {when} {problem}")
    if bool(logits.isnan().any()):
        raise UserError(f"the model {when} gives NaN for {num_images} training images; look for a division by 0 in it")


def _leaves(loss: Tensor) -> set[int]:
    """The ids of the parameters that the graph of `loss` reaches."""
    nodes, seen, leaves = [loss.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        nodes += [following for following, _ in node.next_functions]
    return leaves


def _shapes(model: nn.Module) -> dict[str, tuple[object, ...]]:
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in named}
