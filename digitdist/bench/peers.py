"""An epoch by the means of others, as their users would write and start it: a plain loop, Accelerate, Lightning and Fabric.

Each trains the default network in fp32, with Adam, on the same number of images in global batches of the same size, with the
same number of threads a process, on torchvision's MNIST (`ToTensor`, `Normalize`), which one worker process of each rank
reads. On several processes each uses its own form of DistributedDataParallel. Lightning runs without progress bar, logger,
checkpoints and summary.

Their seconds, like the trainer's own `train_seconds`, are those from when the first batch is asked for, which starts the
worker, to the last update, whose end is awaited. Imports, data sets, networks, process groups and evaluations are not in them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from digitdist.bench.loops import await_device
from digitdist.config import Config, load_config
from digitdist.data import DATA_SETS
from digitdist.distributed import Plan, make_plan
from digitdist.models import build_model


@dataclass
class Epoch:
    """What one rank trains, and its clock. `steps`: how many updates; `share`: images that this rank takes in each.

    `images`: those trained on, which `stop` sums up over all ranks.
    """

    config: Config
    plan: Plan
    data_set: Any
    steps: int
    images: int = 0
    seconds: float | None = None

    def __post_init__(self) -> None:
        world = self.plan.world
        self.share = self.config.data.batch_size // world.size
        self.device = torch.device("cpu") if self.plan.cpu else torch.device(self.plan.device_type, world.local_rank)
        self.model = build_model(self.config.model, self.config.seed, DATA_SETS["mnist"]).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), self.config.optim.lr)

    def loader(self, sampler: DistributedSampler[Any] | None = None) -> DataLoader[Any]:
        """Batches of `share` images in random order, those of `sampler` alone if there is one."""
        return DataLoader(self.data_set, self.share, shuffle=sampler is None, sampler=sampler, num_workers=1, drop_last=True)

    def train(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        model: nn.Module,
        optimizer: Any,
        backward: Callable[[Tensor], None] = Tensor.backward,
    ) -> None:
        """The loop that PyTorch's own tutorials show, for `steps` updates. Collective: every rank must call it."""
        self.start()
        for pixels, labels in itertools.islice(batches, self.steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(pixels.to(self.device)), labels.to(self.device))
            backward(loss)
            optimizer.step()
            self.images += len(labels)
        self.stop()

    def start(self) -> None:
        """Starts the clock on all ranks at once. Collective: every rank must call it."""
        torch.set_num_threads(self.plan.threads)  # after the libraries, some of which set their own
        if dist.is_initialized():
            dist.all_reduce(torch.zeros(1, device=self.device))
        self.began = time.perf_counter()

    def stop(self) -> None:
        """Stops the clock. Collective: every rank must call it."""
        await_device(self.device)
        self.seconds = time.perf_counter() - self.began
        if dist.is_initialized():
            total = torch.tensor(self.images, device=self.device)
            dist.all_reduce(total)
            self.images = int(total)


def plain_loop(epoch: Epoch) -> None:
    """PyTorch alone, with `DistributedSampler` and `DistributedDataParallel` on several processes."""
    model: nn.Module = epoch.model
    sampler: DistributedSampler[Any] | None = None
    if epoch.plan.world.size > 1:
        dist.init_process_group()  # with gloo for CPUs, and what fits for GPUs
        model = DistributedDataParallel(model, None if epoch.plan.cpu else [epoch.device])
        sampler = DistributedSampler(epoch.data_set)
    epoch.train(epoch.loader(sampler), model, epoch.optimizer)


def accelerate_idiom(epoch: Epoch) -> None:
    """Accelerate's first page: `prepare` of everything, and `accelerator.backward`."""
    accelerator = Accelerator(cpu=epoch.plan.cpu, mixed_precision="no")
    model, optimizer, loader = accelerator.prepare(epoch.model, epoch.optimizer, epoch.loader())
    epoch.train(loader, model, optimizer, accelerator.backward)


def fabric_idiom(epoch: Epoch) -> None:
    """Lightning Fabric's first page: `setup` of everything, and `fabric.backward`."""
    from lightning.fabric import Fabric

    fabric = Fabric(**_of_lightning(epoch))
    fabric.launch()
    model, optimizer = fabric.setup(epoch.model, epoch.optimizer)
    epoch.train(fabric.setup_dataloaders(epoch.loader()), model, optimizer, fabric.backward)


def lightning_idiom(epoch: Epoch) -> None:
    """Lightning's first page: a module with its loss and its optimizer, and the `Trainer`, which has the loop."""
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = epoch.model

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            pixels, labels = batch
            epoch.images += len(labels)
            return F.cross_entropy(self.model(pixels), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return epoch.optimizer

        def train_dataloader(self) -> DataLoader[Any]:
            loader = epoch.loader()
            epoch.start()  # here, since Lightning starts the worker as soon as it has the loader
            return loader

        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == epoch.steps:
                epoch.stop()

    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_epochs=1, max_steps=epoch.steps, **off, **_of_lightning(epoch))
    trainer.fit(Classifier())


def _of_lightning(epoch: Epoch) -> dict[str, Any]:
    world = epoch.plan.world
    return {
        "accelerator": "cpu" if epoch.plan.cpu else "auto",
        "devices": world.local_size,
        "strategy": "ddp" if world.size > 1 else "auto",
        "precision": "32-true",
    }


PEERS: dict[str, Callable[[Epoch], None]] = {
    "plain loop": plain_loop,
    "Accelerate": accelerate_idiom,
    "Lightning": lightning_idiom,
    "Fabric": fabric_idiom,
}
NEED_LIGHTNING = ("Lightning", "Fabric")


def training_set(root: str) -> Any:
    """torchvision's MNIST, as its examples prepare it: an image at a time, to float32 [1, 28, 28], normalised."""
    from torchvision import datasets, transforms

    pixels = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    return datasets.MNIST(root, transform=pixels)


def num_steps(config: Config, num_images: int) -> int:
    """Updates of an epoch of whole global batches, or `train.max_steps` where that is fewer."""
    steps = num_images // config.data.batch_size
    return steps if config.train.max_steps is None else min(steps, config.train.max_steps)


def measure_as_peer(name: str, overrides: list[str]) -> dict[str, Any]:
    """An epoch by the peer of that name: seconds, and images of all ranks. Collective: every rank must call it."""
    config = load_config([], overrides)
    torch.manual_seed(config.seed)
    data_set = training_set(config.data.root)
    epoch = Epoch(config, make_plan(config), data_set, num_steps(config, len(data_set)))
    PEERS[name](epoch)
    if dist.is_initialized():
        dist.destroy_process_group()
    assert epoch.seconds, f"{name} has taken fewer than {epoch.steps} steps"
    return {"seconds": epoch.seconds, "images": epoch.images}


def plain_way(overrides: list[str], steps: int) -> float:
    """Images a second of the plain loop on one process, without the start of its worker."""
    config = load_config([], overrides)
    epoch = Epoch(config, make_plan(config), training_set(config.data.root), 3)
    batches = iter(epoch.loader())
    epoch.train(batches, epoch.model, epoch.optimizer)
    epoch.steps, epoch.images = steps, 0
    epoch.train(batches, epoch.model, epoch.optimizer)
    assert epoch.seconds
    return epoch.images / epoch.seconds
