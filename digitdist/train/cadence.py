"""What is due between two steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from digitdist.config import Config
from digitdist.data import Order


@dataclass(frozen=True)
class Due:
    """What is due at a step at which ranks have synchronised; `last`: training ends here."""

    log: bool
    evaluate: bool
    save: bool
    check: bool
    last: bool


@dataclass(frozen=True)
class Cadence:
    """How often, in steps, a training logs, evaluates, saves and compares the weights of its ranks: also at the end, and with 0
    only there; for the comparison 0 means never.

    `patience`: how many evaluations without a better one end it; 0: none do.
    """

    last_step: int
    log_every: int
    evaluate_every: int
    save_every: int
    check_every: int
    patience: int = 0

    @classmethod
    def of_config(cls, config: Config, order: Order, last_step: int) -> Cadence:
        train, evaluate_every = config.train, config.train.eval_every * order.steps_per_epoch
        save_every, check_every = config.checkpoint.every_steps, config.sync.check_every
        return cls(last_step, train.log_every, evaluate_every, save_every, check_every, train.patience)

    def between(self, before: int, step: int) -> Due:
        """What is due at `step` where ranks last synchronised at `before`: that of which a multiple has been reached since."""

        def reached(every: int) -> bool:
            return every > 0 and step // every > before // every

        last = step == self.last_step
        return Due(
            log=last or reached(self.log_every),
            evaluate=last or reached(self.evaluate_every),
            save=last or reached(self.save_every),
            check=self.check_every > 0 and (last or reached(self.check_every)),
            last=last,
        )

    def is_out_of_patience(self, step: int, best: dict[str, Any] | None) -> bool:
        """Whether the evaluation at `step` is the last of `patience` ones of which none was better than `best`, a
        `TrainingState`'s.

        It follows from the two steps how many there were, so an end within an interval, which is evaluated too, counts none.
        """
        if not self.patience or best is None or best.get("evaluated") != step:
            return False
        return step // self.evaluate_every - best["step"] // self.evaluate_every >= self.patience

    def needs_equal_weights(self, step: int) -> bool:
        """Whether the weights after `step` are evaluated or saved, and so must be equal on all ranks."""
        every = (self.evaluate_every, self.save_every)
        return step == self.last_step or any(steps and step % steps == 0 for steps in every)
