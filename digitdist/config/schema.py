"""The schema: every configuration key with its type, default, range and meaning.

A new key is one line here. It says beside itself whether it alters the result of a training (`alters_result`): a run that is
resumed may not change a key that does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

# Bounds beyond which a number is a slip: what is counted up to them fits into any integer and any time that is kept here.
MANY, MANY_IMAGES, FAR, HUGE, MAX_SEED = 10**12, 2**20, 10**9, 1e30, 2**32 - 1


def key(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    alters_result: bool | tuple[str, ...] = True,
) -> Any:
    """A configuration key, with its range (``ge <= x``, ``gt < x``, ``x <= le``).

    `alters_result`: whether the final weights depend on it; a tuple names the values of ``sync.mode`` for which they do.
    """
    metadata = {"help": help, "ge": ge, "gt": gt, "le": le, "alters_result": alters_result}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    """The data set, and how it is cut into batches."""

    name: Literal["mnist", "fashion_mnist", "kmnist", "qmnist", "emnist_digits", "usps", "svhn", "cifar10", "folder"] = key(
        "mnist", "data set; mnist ships with the package, torchvision downloads others; folder: DIR/train/CLASS, DIR/test/CLASS"
    )
    root: str = key("data", "folder where data sets are kept; folder: DIR itself", alters_result=False)
    target: str | None = key(None, "your own data set instead: package.module.Class, in torchvision's convention")
    args: dict[str, Any] = key({}, "keyword arguments of the data set's class")
    image: Literal["mnist", "resize"] = key(
        "mnist", "folder: bring pictures to MNIST's form as predict does, or resize them to data.size and data.channels"
    )
    size: int = key(28, "folder: side of an image in pixels, with data.image=resize", ge=4, le=512)
    channels: int = key(1, "folder: 1 (grey) or 3 (colour), with data.image=resize", ge=1, le=3)
    in_memory: bool | None = key(None, "read images once, or stream them (false); null: once if they are small and fixed")
    workers: int | None = key(
        None, "processes of each rank that read images; null: one a core, at most 4", ge=0, le=64, alters_result=False
    )
    batch_size: int = key(100, "global batch: images of one step, over all ranks and micro-batches", ge=1, le=MANY_IMAGES)
    eval_batch_size: int = key(
        1000,
        "images of an evaluation batch, which is cut into sync.shards chunks",
        ge=1,
        le=MANY_IMAGES,
        alters_result=False,
    )
    validation: int = key(0, "training images held out for choosing", ge=0, le=MANY)
    validation_seed: int | None = key(
        None, "which images are held out: a fixed choice by this number; null: by seed", ge=0, le=MAX_SEED
    )
    focus: int = key(
        1,
        "passes of each epoch after the first, over images with the highest losses and some others; 1: over all",
        ge=1,
        le=1000,
    )


@dataclass
class AugmentConfig:
    """Random changes of training images."""

    shift: float = key(0.0, "largest random shift of a training image, in pixels", ge=0, le=14)
    rotate: float = key(0.0, "largest random rotation, in degrees", ge=0, le=180)
    scale: float = key(0.0, "largest random change of size, as a fraction", ge=0, le=0.9)
    shear: float = key(0.0, "largest random shear, in pixels sideways per pixel of height", ge=0, le=2)


@dataclass
class ModelConfig:
    """The network."""

    name: str = key("cnn", "network: a name in digitdist.models.MODELS")
    target: str | None = key(None, "your own network instead: package.module.Class, images [n,c,h,w] to logits [n,classes]")
    args: dict[str, Any] = key({}, "keyword arguments of the network's class")


@dataclass
class OptimConfig:
    """The optimizer."""

    name: Literal["adam", "adamw", "sgd"] = key("adam", "optimizer")
    lr: float = key(0.001, "learning rate, the peak of the schedule", gt=0, le=HUGE)
    weight_decay: float = key(0.0, "L2 penalty (adam, sgd) or decoupled decay (adamw)", ge=0, le=HUGE)
    momentum: float = key(0.9, "momentum of sgd", ge=0, le=0.9999)
    beta1: float = key(0.9, "decay of Adam's first moment", ge=0, le=0.9999)
    beta2: float = key(0.999, "decay of Adam's second moment", ge=0, le=0.999999)
    clip_norm: float = key(0.0, "largest L2 norm of a step's gradient; 0: no clipping", ge=0, le=HUGE)
    ema: float = key(0.0, "decay of the moving average of weights, which is then evaluated; 0: none", ge=0, le=0.999999)


@dataclass
class ScheduleConfig:
    """The learning rate as a function of the step."""

    name: Literal["constant", "step", "cosine", "onecycle"] = key("constant", "learning rate over steps")
    warmup_steps: int = key(0, "steps of linear warm-up from 0 (onecycle has its own)", ge=0, le=MANY)
    step_epochs: float = key(1.0, "step: epochs between two drops", gt=0, le=FAR)
    gamma: float = key(0.7, "step: factor of a drop", gt=0, le=1)
    peak: float = key(0.3, "onecycle: position of the peak, as a fraction of all steps", ge=0, le=0.99)
    final: float = key(0.0, "cosine, onecycle: last rate as a fraction of optim.lr", ge=0, le=1)


@dataclass
class TrainConfig:
    """The training and its speed."""

    epochs: float = key(9.0, "passes over the training set; may be fractional", gt=0, le=FAR, alters_result=False)
    max_steps: int | None = key(None, "ends training earlier, after this many steps", ge=1, le=MANY, alters_result=False)
    accumulate: int = key(1, "micro-batches a step, to save memory; the step remains that of the global batch", ge=1, le=4096)
    precision: Literal["auto", "fp32", "no", "bf16", "fp16"] = key(
        "auto", "auto: what accelerate launch was told, else the device's best"
    )
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = key(
        "none", "mode of torch.compile (reduce-overhead: with CUDA graphs); delays the first step"
    )
    threads: int | None = key(
        None, "threads a process; default: cores / local ranks, in exact mode 1", ge=1, le=1024, alters_result=("exact",)
    )
    label_smoothing: float = key(0.0, "label smoothing of the training loss", ge=0, le=0.99)
    log_every: int = key(20, "steps between two lines of the log", ge=1, le=MANY, alters_result=False)
    profile: int = key(
        0,
        "steps to profile after a short warm-up, into trace.json of the run's folder; 0: none",
        ge=0,
        le=10_000,
        alters_result=False,
    )
    eval_every: int = key(1, "epochs between two evaluations; 0: only at the end", ge=0, le=MANY, alters_result=False)
    patience: int = key(
        0,
        "ends training after so many evaluations without a better accuracy on held-out images; 0: never",
        ge=0,
        le=MANY,
        alters_result=False,
    )


@dataclass
class SyncConfig:
    """How ranks work together."""

    mode: Literal["ddp", "exact", "local"] = key(
        "ddp",
        "how ranks agree on a step; exact: the same bits on any world size; local: only every few steps (DiLoCo)",
    )
    shards: int = key(8, "exact: fixed parts of a global batch, and the largest world size", ge=1, le=4096)
    every: int = key(50, "local: steps between two synchronisations", ge=1, le=MANY)
    outer_lr: float = key(1.0, "local: rate of the outer step; 1 with outer_momentum=0 is plain averaging", gt=0, le=HUGE)
    outer_momentum: float = key(0.5, "local: Nesterov momentum of the outer step", ge=0, le=0.9999)
    overlap: bool = key(False, "local: train on while ranks exchange; the outer step then comes one round late")
    compress: Literal["none", "bf16", "fp16", "powersgd"] = key("none", "ddp: compression of gradients, for slow links")
    batch_norm: bool = key(
        False, "ddp, on GPUs: BatchNorm takes the statistics of all ranks' images together", alters_result=("ddp",)
    )
    check_every: int = key(
        200,
        "steps between two comparisons of the weights of all ranks; 0: only before checkpoints",
        ge=0,
        le=MANY,
        alters_result=False,
    )
    join_timeout_s: float = key(600.0, "seconds to wait at the start for every rank", gt=0, le=10**6, alters_result=False)
    timeout_s: float = key(
        300.0, "seconds after which a rank that does not answer ends the run", gt=0, le=10**6, alters_result=False
    )


@dataclass
class CheckpointConfig:
    """What is saved and resumed."""

    every_steps: int = key(600, "steps between two checkpoints; 0: only at the end", ge=0, le=MANY, alters_result=False)
    keep: int = key(3, "number of latest checkpoints kept", ge=1, le=MANY, alters_result=False)
    resume: str = key(
        "auto", "auto: resume the run of that name; never: start over; or a checkpoint's folder", alters_result=False
    )
    allow_change: bool = key(False, "resume although a key that alters the result has changed", alters_result=False)


@dataclass
class RunConfig:
    """The run's folder."""

    dir: str = key("runs", "folder of all runs", alters_result=False)
    name: str | None = key(None, "folder of this run in run.dir; default: the time", alters_result=False)
    report: bool = key(True, "write plots and report.html at the end", alters_result=False)


@dataclass
class TrackingConfig:
    """Weights & Biases."""

    wandb: Literal["auto", "online", "offline", "disabled"] = key(
        "auto", "W&B; auto: online with a key and a server that answers, else offline", alters_result=False
    )
    project: str = key("digitdist", "W&B project", alters_result=False)
    entity: str | None = key(None, "W&B entity (user or team)", alters_result=False)
    group: str | None = key(None, "W&B group of runs", alters_result=False)
    tags: list[str] = key([], "W&B tags, such as [a, b]", alters_result=False)
    name: str | None = key(None, "the run's name in W&B; default: that of its folder", alters_result=False)
    notes: str | None = key(None, "W&B notes", alters_result=False)
    artifacts: bool = key(False, "store the final weights as a W&B artifact, with the result as metadata", alters_result=False)


@dataclass
class Config:
    """The whole configuration."""

    seed: int = key(0, "the only source of randomness", ge=0, le=MAX_SEED)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
