"""vLLM's engines without the compilation, which takes longer than these tests compute.

`python -m tests.vllm.eager` is `python -m selfdistill.train` with such engines.
"""

import os
from functools import partial

from selfdistill import train
from selfdistill.training.engine import COLOCATED


def make_engines_eager() -> None:
    """Of this process, from here on."""
    os.environ.update(COLOCATED)
    from trl.generation import vllm_generation
    from vllm import LLM

    vllm_generation.LLM = partial(LLM, enforce_eager=True)


if __name__ == "__main__":
    make_engines_eager()
    train.main()
