"""How much memory a run will need, before anything is loaded."""

from omegaconf import DictConfig

GIB = 2**30


def estimate(cfg: DictConfig, trained: int | None = None) -> dict[str, float]:
    """GiB by part, from the configuration alone: weights, gradients and optimizer, reference and teacher copies.

    Activations are left out, for they depend on lengths that only the run knows. Empty when the model's size is
    unknown (`model.parameters_billion`).

    Args:
        trained: parameters that are trained, where that is known exactly.
    """
    if not cfg.model.parameters_billion:
        return {}
    parameters = cfg.model.parameters_billion * 1e9
    full = cfg.model.tuning == "full"
    bytes_each = (
        0.55
        if cfg.model.load_in_4bit
        else 4
        if cfg.model.dtype == "float32" or full and cfg.model.dtype == "auto"
        else 2
    )
    if trained is None:
        # an adapter of rank r on every linear layer has about 0.04% of the weights per unit of rank at 1B, less above
        trained = int(parameters) if full else int(parameters * 0.0006 * cfg.model.lora.r)
    parts = {"weights": parameters * bytes_each / GIB, "gradients and optimizer": trained * 12 / GIB}
    if full and cfg.beta:
        parts["reference"] = parameters * bytes_each / GIB
    if (
        cfg.teacher is not None
        and "weights" in cfg.teacher
        and not str(cfg.teacher.weights._target_).endswith((".Live", ".Model"))
    ):
        parts["teacher's copy"] = trained * 4 / GIB
    if cfg.hardware.vllm.mode == "colocate" and cfg.hardware.memory_gib:
        parts["vLLM"] = cfg.hardware.memory_gib * cfg.hardware.vllm.gpu_memory_utilization
    return parts
