"""What is due between two steps."""

from __future__ import annotations

from dataclasses import dataclass

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
    only there; for the comparison 0 means never."""

    last_step: int
    log_every: int
    evaluate_every: int
    save_every: int
    check_every: int

    @classmethod
    def of_config(cls, config: Config, order: Order, last_step: int) -> Cadence:
        evaluate_every = config.train.eval_every * order.steps_per_epoch
        return cls(last_step, config.train.log_every, evaluate_every, config.checkpoint.every_steps, config.sync.check_every)

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

    def needs_equal_weights(self, step: int) -> bool:
        """Whether the weights after `step` are evaluated or saved, and so must be equal on all ranks."""
        every = (self.evaluate_every, self.save_every)
        return step == self.last_step or any(steps and step % steps == 0 for steps in every)
