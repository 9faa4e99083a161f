"""What a network does when it is trained, found out on copies of it before a run exists; what cannot be had is refused."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from digitdist.checkpoint import weights_sha256
from digitdist.data import AnySet, DataSetInfo, normalise, seed_generators
from digitdist.distributed import generators_kept
from digitdist.errors import UserError, in_one_line
from digitdist.model_parts import check_parts
from digitdist.model_state import SavedBuffers, model_state
from digitdist.models import output_problem

CPU = torch.device("cpu")  # where trials are
FEW_IMAGES = 4  # of a trial, where the network takes so few
BUILT_IN_TWO_WAYS = (
    "the initial values of {name} are not a function of the seed: two builds of the network differ in them; draw them from"
    " torch, numpy.random or random, not from a generator of your own (or, with sync.mode=ddp, set sync.check_every=0: rank 0's"
    " are taken)"
)
OF_EVERY_MODULE = {"training", *vars(nn.Module())}  # parameters and buffers among them
NOT_IN_EXACT = "; sync.mode=exact can have that in buffers alone: keep it in one (register_buffer), or choose another sync.mode"

Build = Callable[[], nn.Module]
Images = Callable[[int], tuple[Tensor, Tensor, int]]


@dataclass(frozen=True)
class Traits:
    """What trials have shown of a network.

    `layout_problem`: why it does not take channels-last memory, "" where it does. `one_graph`: whether each gradient comes
    through the graph of the loss, and none from a backward pass inside the backward pass. `counting`: plain attributes that
    the same forward pass leaves otherwise when it is repeated, as a counter of passes.
    """

    layout_problem: str = ""
    one_graph: bool = True
    counting: tuple[str, ...] = ()

    @property
    def layout(self) -> torch.memory_format:
        """The memory format that all of its operations take."""
        return torch.contiguous_format if self.layout_problem else torch.channels_last


@dataclass(frozen=True)
class Parts:
    """How many images a network gets at once: the `smallest` part of a global batch and the `largest`, which is all of it, and
    the smallest part of an evaluation, `evaluated`. `where` says in words which part is the smallest, and ``advice(n)`` what to
    change so that each has n images."""

    smallest: int
    largest: int
    evaluated: int
    where: str = ""
    advice: Callable[[int], str] = str

    def sizes(self) -> list[int]:
        """The sizes to try, by rising number: few images, the smallest part, and twice as many again and again."""
        larger = [self.smallest << power for power in range(self.largest.bit_length())]
        return sorted({min(FEW_IMAGES, self.smallest), self.largest, *(size for size in larger if size < self.largest)})


def first_images(images: AnySet, info: DataSetInfo, count: int) -> tuple[Tensor, Tensor, int]:
    """The first `count` of `images`, or all where there are fewer, for a trial: pixels, labels, and the number of classes."""
    batch = images.read(torch.arange(min(count, len(images))))
    return normalise(batch.images, info), batch.labels, info.num_classes


def inspect_model(
    build: Build,
    images: Images,
    parts: Parts,
    bf16: bool,
    mode: str,
    repeatable: bool = True,
) -> Traits:
    """Tries the network that `build` makes on images with their labels; the generators are left as they were.

    ``images(n)`` gives pixels, float32 [n, c, h, w], and labels, int64 [n], of n training images, and the number of classes;
    `mode` is `sync.mode`; with `repeatable` two builds must be equal.

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
        for count in parts.sizes():
            try:
                found = _trial(build(), *images(count), bf16, mode)
                break
            except UserError:
                raise
            except Exception as error:  # a user's network may raise anything
                problem = in_one_line(error)
        if found is None:
            raise UserError(f"the model cannot be trained: {problem}")
        if count > parts.smallest:
            raise UserError(
                f"the model cannot be trained on {_images(parts.smallest)} at once ({problem}), but on {count}; {parts.where};"
                f" {parts.advice(count)}"
            )
        _check_evaluated(build(), *images(parts.evaluated), bf16)
        return Traits(layout_problem(build, *images(count), bf16, found.logits), found.one_graph, found.counting)


def _images(count: int) -> str:
    return f"{count} image{'s' if count > 1 else ''}"


def _check_evaluated(model: nn.Module, pixels: Tensor, labels: Tensor, num_classes: int, bf16: bool) -> None:
    try:
        _evaluate_once(model, pixels, num_classes, bf16)
    except UserError:
        raise
    except Exception as error:  # a user's network may raise anything
        raise UserError(
            f"the model cannot be evaluated on {_images(len(pixels))} at once ({in_one_line(error)}), which the last part of an"
            " evaluation has; choose another data.eval_batch_size, or let forward take any number of images"
        ) from error


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


def _check_repeatable(state: dict[str, Tensor], again: dict[str, Tensor]) -> None:
    for name in state.keys() & again.keys():
        if weights_sha256({name: state[name]}) != weights_sha256({name: again[name]}):
            raise UserError(BUILT_IN_TWO_WAYS.format(name=name))


@dataclass(frozen=True)
class _Outcome:
    logits: Tensor
    one_graph: bool
    counting: tuple[str, ...] = ()


def _trial(model: nn.Module, pixels: Tensor, labels: Tensor, num_classes: int, bf16: bool, mode: str = "") -> _Outcome:
    """Two training steps without an update, and an evaluation between them; with a `mode`, the first step once more."""
    exact = mode == "exact"
    shapes, before, saved = _shapes(model), _outside_buffers(model) if exact else {}, SavedBuffers(model)
    first, one_graph = _train_once(model, pixels, labels, num_classes, bf16)
    attributes = _attributes(model)
    logits = _evaluate_once(model, pixels, num_classes, bf16)
    one_graph &= _train_once(model, pixels, labels, num_classes, bf16, seed=1)[1]
    changed = sorted(name for name, shape in (_shapes(model).items() ^ shapes.items()))
    if changed:
        raise UserError(
            f"{changed[0]} changes its shape or dtype in forward, or is made there; make it in __init__, at full size"
        )
    if not mode:
        return _Outcome(logits, one_graph)
    now = _outside_buffers(model) if exact else {}
    saved.restore()
    again, _ = _train_once(model, pixels, labels, num_classes, bf16)
    counting = tuple(sorted(name for name, value in _attributes(model).items() if attributes.get(name) != value))
    if exact:
        for name in sorted(name for name in before if before[name] != now.get(name)):
            raise UserError(f"{name} changes in forward{NOT_IN_EXACT}")
        if not torch.equal(again, first):
            places = ", ".join(counting)
            raise UserError(
                "a forward pass gives other logits for the same images, seed, weights and buffers: the model keeps something"
                f" from one to the next{f', perhaps in {places}' if places else ''}{NOT_IN_EXACT}"
            )
    return _Outcome(logits, one_graph, counting)


def _outside_buffers(model: nn.Module) -> dict[str, str]:
    """A hash of each parameter and each extra state of `model`."""
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return {name: weights_sha256({name: tensor}) for name, tensor in model_state(model).items() if name not in buffers}


def _attributes(model: nn.Module) -> dict[str, str]:
    """What modules have as plain attributes, by name, as texts of the numbers and tensors in it."""
    named = ((name, key, value) for name, module in model.named_modules() for key, value in vars(module).items())
    return {f"{name}.{key}".lstrip("."): _numbers(value) for name, key, value in named if key not in OF_EVERY_MODULE}


def _numbers(value: object) -> str:
    """A text that tells the numbers and tensors in `value` from others, also in lists and dicts of them."""
    match value:
        case Tensor():
            return weights_sha256({"": value})
        case int() | float():
            return repr(value)
        case list() | tuple() | deque():
            return f"[{', '.join(map(_numbers, value))}]"
        case dict():
            return _numbers(list(value.values()))
        case _:
            return ""


def _train_once(
    model: nn.Module, pixels: Tensor, labels: Tensor, num_classes: int, bf16: bool, seed: int = 0
) -> tuple[Tensor, bool]:
    """One forward and backward pass: its logits, and whether all gradients came through the graph of the loss."""
    model.train().zero_grad()
    seed_generators(seed, CPU)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(pixels.clone())  # which a network may change in place, as it may those of a training
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
        logits = model(pixels.clone())  # which a network may change in place, as it may those of a training
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
