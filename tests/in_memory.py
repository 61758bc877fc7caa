"""A program for several processes: full training with a KL penalty of a model that is on no disk."""

import os
from pathlib import Path

import torch

from tests.training.naive import by_length, lively, logged, make


def main() -> None:
    model = lively(dtype=torch.float32)
    source = model.config.name_or_path
    trainer, _ = make(Path(os.environ["RANK"]), model, {"beta": 0.02, "max_steps": 1}, reward_funcs=by_length)
    trainer.train()
    assert abs(logged(trainer, "kl")[0]) < 1e-6
    assert model.config.name_or_path == source


if __name__ == "__main__":
    main()
