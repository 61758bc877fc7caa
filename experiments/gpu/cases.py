"""What is measured: the list of cases. Imports nothing heavy, for the process that starts the others."""

from collections.abc import Iterator
from dataclasses import dataclass

COMPOSITIONS = ("sft", "grpo_supervised", "sdft", "sdpo", "sdpo_feedback", "hybrid", "gkd")
# The same with completions from a vLLM in the same process, which sleeps while the student learns.
WITH_VLLM = ("grpo_supervised", "sdft", "sdpo", "gkd")
# The divergence alone, from hidden states to their gradient, by its interpolation alpha.
LOSSES = {"loss_forward": 0.0, "loss_jensen_shannon": 0.5, "loss_reverse": 1.0}
# Fifteen updates of 128 trajectories, as published for other frameworks; RESULTS.md has their numbers.
OPD = "opd"
SHAPES = ("0.5b", "7b")
SIDES = ("ours", "trl")
OWN_TEACHER = ("gkd", OPD)  # those whose teacher is another model of the same size


@dataclass(frozen=True)
class Case:
    """One trainer at one work.

    Attributes:
        work: a composition, one of the losses, or `opd`.
        shape: of the model.
        sampler: who writes the completions, `transformers` or `vllm`; `none` where none are written.
        side: whose trainer, `ours` or `trl`.
    """

    work: str
    shape: str
    sampler: str
    side: str

    @property
    def name(self) -> str:
        return "-".join((self.work, self.shape, self.sampler, self.side))

    @property
    def limit_s(self) -> float:
        """After so long the case is ended and counts as failed."""
        return {"0.5b": 180.0, "0.6b": 480.0, "7b": 400.0}[self.shape]

    def folders(self, tiny: bool) -> list[str]:
        """The models that it needs: the student's, and its teacher's where that is another one."""
        if self.work in LOSSES:
            return []
        return [folder_name(self.shape, seed, tiny) for seed in range(1 + (self.work in OWN_TEACHER))]


def folder_name(shape: str, seed: int, tiny: bool) -> str:
    """What a model's folder is called."""
    return f"{shape}-{seed}{'-tiny' if tiny else ''}"


def _all() -> Iterator[Case]:
    for shape in SHAPES:
        for work in LOSSES:
            yield from (Case(work, shape, "none", side) for side in SIDES)
        for work in COMPOSITIONS:
            sampler = "none" if work == "sft" else "transformers"
            yield from (Case(work, shape, sampler, side) for side in SIDES)
        for work in WITH_VLLM:
            yield from (Case(work, shape, "vllm", side) for side in SIDES)
    for sampler in ("transformers", "vllm"):
        yield from (Case(OPD, "0.6b", sampler, side) for side in SIDES)


CASES = {case.name: case for case in _all()}
