"""How much memory a run will need, before anything is loaded."""

from omegaconf import DictConfig

from selfdistill.config.schema import Run, Student
from selfdistill.config.targets import declares

GIB = 2**30
# Trained parameters per parameter of the model and unit of rank, with an adapter on every linear layer: between the
# 0.001 of a model of 0.6 billion and the 0.0003 of one of 7 billion.
ADAPTER_SHARE = 0.0006
TRAINED_TENSORS = 3  # beside a trained parameter: its gradient and two optimizer states, in its own precision


def estimate(run: Run | DictConfig, trained: int | None = None) -> dict[str, float]:
    """GiB by part, from the configuration alone: weights, gradients and optimizer, reference and teacher copies.

    Activations are left out, for they depend on lengths that only the run knows. Empty when the model's size is
    unknown (`model.parameters_billion`).

    Args:
        run: a run, or a composed configuration that was not checked.
        trained: parameters that are trained, where that is known exactly.
    """
    model, vllm = run.model, run.hardware.vllm
    if not model.parameters_billion:
        return {}
    parameters = model.parameters_billion * 1e9
    full = model.tuning == "full"
    if trained is None:
        trained = int(parameters if full else parameters * ADAPTER_SHARE * model.lora.r)
    weights = parameters * _bytes_each(model) / GIB
    trained_bytes = _bytes_each(model) if full else 4  # an adapter is float32, also on a quantised model
    parts = {
        "weights": weights if full else weights + trained * trained_bytes / GIB,
        "gradients and optimizer": trained * trained_bytes * TRAINED_TENSORS / GIB,
    }
    if full and run.beta:
        parts["reference"] = weights
    if run.teacher is not None and declares("teacher.weights", run.teacher.get("weights"), "keeps_copy"):
        parts["teacher's copy"] = trained * 4 / GIB  # float32
    if vllm.mode == "colocate" and run.hardware.memory_gib:
        parts["vLLM"] = run.hardware.memory_gib * vllm.gpu_memory_utilization
    return parts


def _bytes_each(model: Student | DictConfig) -> float:
    """Memory of one weight of the model without its adapter."""
    if model.load_in_4bit:
        return 0.55  # four bits and the scales of their blocks
    in_float32 = model.dtype == "float32" or (model.tuning == "full" and model.dtype == "auto")
    return 4 if in_float32 else 2
