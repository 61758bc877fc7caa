"""Asks vLLM, where it is installed, what it makes of an export."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from selfdistill.models.export import ExportError
from selfdistill.models.export.verify import POSITIONS, TOLERANCES, TransformersModel, answers_alike, compared_prompts
from selfdistill.models.export.workers import Program
from selfdistill.rollout import Prompt


def check_with_vllm(
    trained: TransformersModel,
    folder: Path,
    prompts: Sequence[Prompt],
    *,
    base: str | None = None,
    rank: int = 16,
    dtype: str = "auto",
    limit: float | None = None,
    python: str | None = None,
) -> list[str]:
    """Compares greedy answers and log-probabilities in vLLM with those of the model in memory.

    Args:
        folder: of the export.
        base: where the folder is an adapter, the model that it belongs to.
        rank: of that adapter.
        dtype: what vLLM computes in.
        limit: of the largest difference of a log-probability; None: that of 16 bit.
        python: the interpreter that has vLLM; None: this one, if it has.

    Returns:
        A sentence for the export's page, also where vLLM is there but cannot load the model on this machine; nothing
        where it isn't installed.

    Raises:
        ExportError: a difference above the limit.
    """
    if python is None and find_spec("vllm") is None:
        return []
    trained.tell("asking vLLM")
    longest = max(len(trained.encode(prompt)) for prompt in compared_prompts(trained, prompts)) + POSITIONS
    settings = {"model": base or str(folder), "context_tokens": longest, "dtype": dtype}
    if base is not None:
        settings |= {"adapter": str(folder), "rank": rank}
    environment = {key: value for key, value in os.environ.items() if python is None or not key.startswith("PYTHON")}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, read by its CPU build alone
    try:
        with Program(
            "vllm_engine",
            settings,
            dtype=dtype,
            python=python or sys.executable,
            chat_template_kwargs=trained.chat_template_kwargs,
            environment=environment,
        ) as engine:
            name = engine.ask("version")
            found = answers_alike(trained, engine, prompts)
    except ExportError as error:
        return [f"vLLM is installed where this was exported, but could not be asked: {error}"]
    allowed = limit or TOLERANCES["bfloat16"].logprob_difference
    if not found.max_logprob_difference <= allowed:
        raise ExportError(
            f"{name} gives a token of an answer another log-probability, by {found.max_logprob_difference:.3g}, "
            f"allowed {allowed:g}"
        )
    return [
        f"{name}: {found.greedy_equal} of {found.prompts} greedy answers are the same, and the log-probability of "
        f"their tokens differs by {found.max_logprob_difference:.2g} at most (allowed: {allowed:g})."
    ]
