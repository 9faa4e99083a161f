"""What the tests of GPUs train: groups of runs, by the world size on which they are made."""

from __future__ import annotations

from digitdist.models import MODELS
from helpers import on_device
from helpers.launching import QUIET
from helpers.on_device import BEST, FEW, FP32, PRECISIONS, SIMULATED, Group

MOST = max(2, min(on_device.num_devices(), 7))  # the largest world that is tried
# Options that change what a step computes.
EVERYTHING = (
    *("model.name=convnet", "optim.name=adamw", "optim.ema=0.9", "optim.clip_norm=0.5", "train.label_smoothing=0.1"),
    *("augment.rotate=9", "augment.shift=1", "augment.scale=0.1", "augment.shear=0.1", "train.accumulate=2"),
)
# 16 steps, with a checkpoint and the end of an epoch in their midst.
EXACT = (*FEW, "sync.mode=exact", "train.max_steps=16", "checkpoint.every_steps=10")
EXACT_EVERYTHING = (*EXACT, *EVERYTHING, "sync.shards=2", "data.focus=2", BEST)
EXACT_OPTIONS = {"everything": EXACT_EVERYTHING}
if not SIMULATED:
    EXACT_OPTIONS["dropout"] = (*EXACT, "sync.shards=5", FP32)
if on_device.has("fp16"):
    EXACT_OPTIONS["sgd, fp16"] = (*EXACT, "optim.name=sgd", "optim.lr=0.03", "train.precision=fp16")
# Shards of 7 or 8 images of 50, and 1 or 2 in the last batch of an epoch: no number of ranks divides them.
UNEVEN = (*EXACT, *EVERYTHING, "train.accumulate=1", "sync.shards=7", "sync.check_every=5", "train.log_every=1", BEST)

OPTIMIZERS = {"adam": 0.003, "adamw": 0.003, "sgd": 0.03}  # with their rates
PAIRS = [(model, name) for model in MODELS for name in OPTIMIZERS]
if SIMULATED:  # each network and each optimizer once
    PAIRS = [("cnn", "adam"), ("cnn_batchnorm", "adamw"), ("convnet", "sgd"), ("columns", "adam")]

FP16 = FP32 if SIMULATED else "train.precision=fp16"
OVERFLOWING = {
    "sgd": ("optim.name=sgd", "optim.lr=0.03"),
    "clipped": ("optim.name=sgd", "optim.lr=0.03", "optim.clip_norm=1"),
}
if not SIMULATED:
    OVERFLOWING |= {
        "adam, BatchNorm, EMA": ("model.name=convnet", "optim.ema=0.9"),
        "accumulated": ("train.accumulate=2",),
        "exact": ("sync.mode=exact",),
    }

# A dry run trains uncompiled, so that all but the compiler is tried.
MODES = ["none"] if SIMULATED else ["default", "reduce-overhead", "max-autotune"]
COMPILED = {"columns": ("model.name=columns", "optim.name=sgd", "optim.lr=0.03")}
if not SIMULATED:
    COMPILED |= {"EMA": ("model.name=convnet", "optim.ema=0.9"), "dropout": ("model.name=cnn",)}

PROFILED = 10  # steps
COMPARED = 10 if SIMULATED else 100  # steps of a comparison of losses
SMOOTH = (*FEW, "model.target=helpers.networks.Smooth", "train.log_every=1", "train.eval_every=0", "sync.check_every=1")
COMPRESSIONS = ["bf16"] if SIMULATED else ["bf16", "fp16", "powersgd"]
OVERLAPS = ["true"] if SIMULATED else ["false", "true"]
MIDDLE, END = (5, 8) if SIMULATED else (12, 18)  # where a run is resumed, and ends
LOCAL = (*FEW, FP32, "model.name=convnet", "optim.ema=0.9", "sync.mode=local", "sync.every=3", "sync.check_every=1")
SHORT = {"ddp": (*FEW, FP32, "train.max_steps=3")}
if not SIMULATED:
    SHORT |= {"exact": (*SHORT["ddp"], "sync.mode=exact"), "local": (*SHORT["ddp"], "sync.mode=local", "sync.every=2")}
    SHORT["streamed"] = (*SHORT["ddp"], "data.in_memory=false", "data.workers=1")
WITHOUT_TF32 = {"NVIDIA_TF32_OVERRIDE": "0"}
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # as exact mode sets it


def in_two_parts(name: str, *arguments: str) -> Group:
    """A run, and one that is resumed in its midst, with kernels that give the same bits each time."""
    options = (*arguments, f"train.max_steps={END}", f"checkpoint.every_steps={MIDDLE}")
    first = (*options, f"train.max_steps={MIDDLE}", f"run.name={name}")
    return Group({f"{name}, unbroken": options, f"{name}, first part": first, name: options}, "deterministic", DETERMINISTIC)


def on_one_gpu() -> dict[str, Group]:
    """Groups that need one GPU."""
    groups = {f"networks, {precision}": networks(precision) for precision in PRECISIONS}
    exact = {f"{name}, {time}": options for name, options in EXACT_OPTIONS.items() for time in ("once", "again")}
    groups["exact runs"] = Group(exact, {name: "offsets" for name in exact if name.endswith("once")})
    overflow = (*FEW, FP16, "train.log_every=1", "train.max_steps=6" if SIMULATED else "train.max_steps=12")
    parts = {"scaled, first part": (*overflow, "train.max_steps=4", "run.name=scaled"), "scaled": overflow}
    groups["overflow"] = Group({name: (*overflow, *own) for name, own in OVERFLOWING.items()} | parts, "overflow")
    for mode in {"none", *MODES}:
        common = (*FEW, FP32, "train.max_steps=20", f"train.compile={mode}")
        cases = {f"{name}, {mode}": (*common, *own) for name, own in COMPILED.items()}
        if mode in ("none", "default"):  # a mode with CUDA graphs is refused with it
            cases[f"accumulated, {mode}"] = (*common, "model.name=convnet", "train.accumulate=3")
        groups[f"compiled, {mode}"] = Group(cases, "uncompiled", WITHOUT_TF32)
    groups["refused"] = Group(
        {
            "fp8": (*FEW, "train.precision=fp8"),
            "reduce-overhead": (*FEW, FP32, "train.compile=reduce-overhead", "train.accumulate=2"),
            "max-autotune": (*FEW, FP32, "train.compile=max-autotune", "train.accumulate=2"),
            "compiled, exact": (*FEW, FP32, "train.compile=default", "sync.mode=exact"),
            "infinite": (*FEW, FP32, "optim.name=sgd", "optim.lr=1e15", "train.log_every=10"),
        }
    )
    profiled = ("train.max_steps=20", "train.log_every=100", f"train.profile={PROFILED}")
    short = (*FEW, "train.max_steps=3") if SIMULATED else ()
    groups["profiled"] = Group({"profiled": (*(FEW if SIMULATED else QUIET), BEST, *profiled)})
    groups["recipe"] = Group({"fast": ("--config", "fast", *QUIET, BEST, *short)})
    groups["auto"] = Group({"auto": (*FEW, BEST, "train.max_steps=2")}, "looks")
    groups["for commands"] = Group({"trained": (*FEW, FP32, "model.name=convnet", "train.max_steps=40")})
    return groups


def networks(precision: str) -> Group:
    common = (*FEW, precision, "train.max_steps=20")
    cases = {(m, o): (f"model.name={m}", f"optim.name={o}", f"optim.lr={OPTIMIZERS[o]}") for m, o in PAIRS}
    return Group({f"{m}, {o}, {precision[16:]}": (*common, *own) for (m, o), own in cases.items()}, "looks")


def on_several_gpus() -> dict[str, dict[int, Group]]:
    """Groups whose runs are compared over world sizes, or need two ranks."""
    sizes = range(1, MOST + 1)
    groups: dict[str, dict[int, Group]] = {
        "uneven": {size: Group({f"exact on {size}": UNEVEN}) for size in sizes},
        "first part": {MOST: Group({"first part": (*UNEVEN, "train.max_steps=13", "run.name=resumed")})},
        "resumed": {1: Group({"resumed": UNEVEN})},
        "views": {2: Group({"views": SHORT["ddp"]}, "looks")},
        "contexts": {2: Group({f"contexts, {name}": options for name, options in SHORT.items()}, "contexts")},
    }
    for name, options in SHORT.items():
        groups[f"{name} alone"] = {2: Group({f"{name} alone": options}, env={"NCCL_DEBUG": "WARN"})}
    for precision in PRECISIONS:
        options = (*SMOOTH, precision, f"train.max_steps={COMPARED}")
        groups[precision] = {size: Group({f"{precision} on {size}": options}, env=WITHOUT_TF32) for size in sizes}
    if not SIMULATED:
        options = (*FEW, FP32, "model.name=convnet", "sync.batch_norm=true", "train.log_every=1", "train.max_steps=20")
        cases = {size: {f"BatchNorm on {size}": (*options, "data.args.count=600")} for size in (1, 2)}
        groups["BatchNorm"] = {size: Group(of_size, env=WITHOUT_TF32) for size, of_size in cases.items()}
    for compress in COMPRESSIONS:
        parts = in_two_parts(compress, *SMOOTH, FP32, f"sync.compress={compress}")
        whole = {f"{compress}, whole": (*SMOOTH, FP32, "train.max_steps=1")}
        groups[compress] = {2: Group({**parts.cases, **whole}, parts.watch, parts.env)}
    for overlap in OVERLAPS:
        name = f"local, overlap {overlap}"
        groups[name] = {2: in_two_parts(name, *LOCAL, f"sync.overlap={overlap}")}
    return groups


GROUPS: dict[str, dict[int, Group]] = {name: {1: group} for name, group in on_one_gpu().items()} | on_several_gpus()
