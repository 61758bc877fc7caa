"""How the completions of one optimizer step are spread over processes and passes."""

from dataclasses import dataclass
from math import lcm
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
    at_once, accumulation = hardware.per_device_batch_size, hardware.accumulation_steps

    def together(completions: int) -> int:
        """Completions of one pass of all processes: as many as fit, but no more than a step has."""
        return processes * min(at_once, max(1, completions // processes))

    def fits(completions: int) -> bool:
        return completions % generations == 0 and completions % together(completions) == 0

    completions = at_once * accumulation * processes if accumulation else run.completions_per_step
    if fits(completions):
        return Batch(together(completions) // processes, completions // together(completions), processes)

    always = lcm(generations, at_once * processes)  # this many completions fit, and any multiple
    among = f" x {processes} processes" if processes > 1 else ""
    if accumulation:
        made_of = f"hardware.per_device_batch_size={at_once} x hardware.accumulation_steps={accumulation}{among}"
        instead = f"hardware.accumulation_steps={always // (at_once * processes)}"
    else:
        nearest = min(filter(fits, range(1, completions + always + 1)), key=lambda n: abs(n - completions))
        made_of, instead = f"completions_per_step={completions}", f"completions_per_step={nearest}"
    if completions % generations:
        divisors = [n for n in range(1, completions + 1) if completions % n == 0]
        raise UserError(
            f"num_generations={generations} does not divide a batch of {completions} completions ({made_of}): write "
            f"num_generations={min(divisors, key=lambda n: abs(n - generations))}, or {instead}."
        )
    raise UserError(
        f"{made_of} cannot be divided into passes of {together(completions)} completions "
        f"(hardware.per_device_batch_size={at_once}{among}): write {instead}, or a hardware.per_device_batch_size "
        "that divides them."
    )
