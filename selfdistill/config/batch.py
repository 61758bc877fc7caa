"""How the completions of one optimizer step are spread over processes and passes."""

from dataclasses import dataclass
from math import gcd, lcm
from os import environ

from selfdistill.config.schema import Run
from selfdistill.errors import UserError


@dataclass(frozen=True)
class Batch:
    """The completions of one optimizer step.

    Attributes:
        per_device: completions of one process in one forward and backward pass.
        accumulation_steps: such passes of one process.
        processes: processes that train.
    """

    per_device: int
    accumulation_steps: int
    processes: int

    @property
    def completions(self) -> int:
        """Of all passes and processes together."""
        return self.per_device * self.accumulation_steps * self.processes


def batch_of(run: Run) -> Batch:
    """The method says how many completions a step has, the machine how many fit into memory at once.

    A profile that holds more than a step needs is not filled. `hardware.accumulation_steps`, where it is set, decides
    in place of `completions_per_step`.

    Raises:
        UserError: the completions cannot be divided evenly into prompts, processes and passes.
    """
    generations, hardware, processes = run.num_generations, run.hardware, int(environ.get("WORLD_SIZE", 1))
    at_once = hardware.per_device_batch_size
    among = f" x {processes} processes" if processes > 1 else ""
    if hardware.accumulation_steps is not None:
        batch = Batch(at_once, hardware.accumulation_steps, processes)
        made_of = (
            f"hardware.per_device_batch_size={at_once} x hardware.accumulation_steps={hardware.accumulation_steps}"
        )
        fitting = f"hardware.accumulation_steps={generations // gcd(generations, at_once * processes)}"
        _check_generations(batch.completions, generations, f"{made_of}{among}", fitting)
        return batch
    completions = run.completions_per_step
    together = _together(completions, at_once, processes)
    nearest = f"completions_per_step={_nearest_fitting(completions, generations, at_once, processes)}"
    _check_generations(completions, generations, f"completions_per_step={completions}", nearest)
    if completions % together:
        smaller = next(n for n in range(at_once, 0, -1) if completions % processes or completions // processes % n == 0)
        instead = "" if completions % processes else f", or hardware.per_device_batch_size={smaller}"
        raise UserError(
            f"completions_per_step={completions} cannot be divided into passes of {together} completions "
            f"(hardware.per_device_batch_size={at_once}{among}): write {nearest}{instead}."
        )
    return Batch(together // processes, completions // together, processes)


def _check_generations(completions: int, generations: int, made_of: str, instead: str) -> None:
    if completions % generations:
        divisors = [n for n in range(1, completions + 1) if completions % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - generations))
        raise UserError(
            f"num_generations={generations} does not divide a batch of {completions} completions ({made_of}): "
            f"write num_generations={nearest}, or {instead}."
        )


def _together(completions: int, at_once: int, processes: int) -> int:
    """Completions of all processes in one pass: as many as fit, but no more than a step has."""
    return processes * min(at_once, max(1, completions // processes))


def _nearest_fitting(completions: int, generations: int, at_once: int, processes: int) -> int:
    """The number of completions nearest to the one that was asked for which can be divided."""
    always = lcm(generations, at_once * processes)
    fitting = (
        n
        for n in range(generations, completions + always + 1, generations)
        if n % _together(n, at_once, processes) == 0
    )
    return min(fitting, key=lambda n: abs(n - completions))
