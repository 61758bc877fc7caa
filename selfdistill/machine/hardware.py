"""The machine: Python, torch and its CUDA, driver, GPU memory, disk, hub, W&B."""

import netrc
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from omegaconf import DictConfig

from selfdistill.errors import first_line
from selfdistill.machine.findings import Line, error, ok, warning

GIB = 2**30
OLDEST_PYTHON = (3, 11)
NEWEST_TRIED_PYTHON = (3, 13)
LITTLE_DISK_GIB, TOO_LITTLE_DISK_GIB = 20.0, 2.0
WANDB_HOST = "api.wandb.ai"


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch or the driver sees it."""

    name: str
    memory_gib: float
    free_gib: float
    bf16: bool = True


@dataclass(frozen=True)
class Accelerator:
    """What torch and the driver say.

    Attributes:
        torch: its version, None without torch.
        cuda: the CUDA version it was built for, None for a CPU build.
        driver: the driver's version as nvidia-smi tells it, None without one.
        gpus: what torch can use.
        failure: why torch cannot use a GPU that it was built for.
    """

    torch: str | None
    cuda: str | None = None
    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()
    failure: str | None = None


def look_at_accelerator() -> Accelerator:
    """Ask torch and the driver."""
    driver = _driver()
    try:
        import torch
    except (ImportError, OSError) as problem:
        return Accelerator(None, driver=driver, failure=first_line(problem))
    failure, gpus = None, []
    if torch.version.cuda is not None:
        try:
            if torch.cuda.is_available():
                for index in range(torch.cuda.device_count()):
                    free, total = torch.cuda.mem_get_info(index)
                    name = torch.cuda.get_device_name(index)
                    gpus.append(Gpu(name, total / GIB, free / GIB, torch.cuda.is_bf16_supported(False)))
                torch.zeros(1, device="cuda").add_(1).item()  # a build without kernels for this GPU fails only here
            else:
                failure = "torch finds no GPU"
        except RuntimeError as problem:
            failure = first_line(problem)
    return Accelerator(torch.__version__, torch.version.cuda, driver, tuple(gpus), failure)


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=20).split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Line:
    shown = ".".join(map(str, version))
    if version[:2] < OLDEST_PYTHON:
        return error("python", shown, "Python 3.11 or newer is needed: make a new environment with it")
    if version[:2] > NEWEST_TRIED_PYTHON:
        advice = "newer than what was tried (3.11 to 3.13); some packages may have no build for it"
        return warning("python", shown, advice)
    return ok("python", f"{shown}, {platform.system()} {platform.machine()}")


def check_torch(accelerator: Accelerator) -> Line:
    """torch against CUDA and the driver."""
    build = f"CUDA {accelerator.cuda}" if accelerator.cuda else "CPU build"
    driver = f"driver {accelerator.driver}" if accelerator.driver else "no NVIDIA driver"
    found = f"torch {accelerator.torch} ({build}), {driver}"
    if accelerator.torch is None:
        return error("torch", f"cannot be imported ({accelerator.failure})", "pip install torch==2.13.0")
    if accelerator.driver and accelerator.cuda is None:
        advice = "a GPU is here and unused: install a CUDA build of torch, pip install torch --force-reinstall"
        return warning("torch", found, advice)
    if not accelerator.failure:
        return ok("torch", found)
    found += f": {accelerator.failure}"
    if not accelerator.driver:
        return warning("torch", found, "training runs on the CPU; for a GPU install its driver")
    advice = "update the driver, which is older than torch's CUDA, or torch, which has no kernels for this GPU"
    return error("torch", found, advice)


def check_memory(accelerator: Accelerator, cfg: DictConfig) -> list[Line]:
    """The GPU against the hardware profile and the memory that the composition will take."""
    from selfdistill.machine.memory_estimate import estimate

    device, offered = cfg.hardware.device, cfg.hardware.memory_gib
    gpus = accelerator.gpus
    if device == "cuda" and not gpus:
        return [error("GPU", "none that torch can use", "write hardware=cpu, or hardware=auto to take what is there")]
    if not gpus or device == "cpu":
        return [ok("GPU", "not used" if gpus else "none; training runs on the CPU")]
    gpu = gpus[0]
    shown = f"{gpu.name}, {gpu.memory_gib:.0f} GiB, {gpu.free_gib:.0f} free"
    lines = []
    if offered and offered > gpu.memory_gib * 1.05:  # a 24 GB card has a little less than 24 GiB
        found = f"{shown}; the profile is for {offered:g} GiB"
        lines.append(error("GPU", found, "choose a smaller hardware profile, e.g. hardware=gpu_16gb"))
    if cfg.hardware.precision == "bf16" and not gpu.bf16:
        lines.append(error("GPU", f"{gpu.name} has no bfloat16", "write hardware.precision=fp16 or auto"))
    needed = sum(estimate(cfg).values())
    if needed > gpu.free_gib:
        found = f"about {needed:.1f} GiB are needed before activations, {gpu.free_gib:.1f} are free"
        advice = "end what else uses the GPU, or write model.tuning=lora, model.load_in_4bit=true, a smaller model"
        lines.append(error("GPU memory", found, advice))
    return lines or [ok("GPU", f"{shown}; about {needed:.1f} GiB needed before activations" if needed else shown)]


def check_disk(folder: Path) -> Line:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free_gib = shutil.disk_usage(place).free / GIB
    found = f"{free_gib:.0f} GiB free for {folder}"
    if not os.access(place, os.W_OK):
        return error("disk", f"{place} cannot be written", "write output_dir=FOLDER with one that can")
    if free_gib < TOO_LITTLE_DISK_GIB:
        advice = "checkpoints and exports will not fit: make room, or write output_dir=FOLDER elsewhere"
        return error("disk", found, advice)
    if free_gib < LITTLE_DISK_GIB:
        return warning("disk", found, "enough for small models; checkpoints of large ones take several GiB each")
    return ok("disk", found)


def check_hub(name: str, local_files_only: bool, environment: Mapping[str, str] = os.environ) -> Line:
    """Whether the model can be had: from the package, a folder, the local cache or the hub."""
    if name == "embedded":
        return ok("model", "embedded in the package; no hub needed")
    if Path(name).exists():
        if (Path(name) / "config.json").exists():
            return ok("model", f"the folder {name}")
        advice = "write model.name= with a folder that save_pretrained wrote"
        return error("model", f"the folder {name} has no config.json", advice)
    from huggingface_hub import constants, get_token, hf_hub_url, try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    offline = local_files_only or environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    if offline and cached:
        return ok("model", f"{name}, in the local cache; offline by configuration")
    if offline:
        advice = "download it first, or unset HF_HUB_OFFLINE and model.local_files_only"
        return error("model", f"{name} is not in the local cache, and the hub is switched off", advice)
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        status = httpx.head(hf_hub_url(name, "config.json"), headers=headers, timeout=5.0).status_code
    except httpx.HTTPError as problem:
        found = f"{constants.ENDPOINT} cannot be reached ({problem or type(problem).__name__})"
        if cached:
            return warning("model", f"{found}; {name} is in the local cache", "write model.local_files_only=true")
        return error("model", found, "check network and proxy, set HF_ENDPOINT to a mirror, or write model.name=FOLDER")
    if status in (401, 403):
        login = "the token has no access to it" if token else "then `hf auth login` or set HF_TOKEN"
        return error("model", f"{name}: the hub answers HTTP {status}", f"accept its terms on the hub; {login}")
    if status == 404:
        return error("model", f"{name}: no such model on the hub", "look at the spelling, owner/name")
    if status >= 400:
        return warning("model", f"{name}: the hub answers HTTP {status}", "try again later")
    return ok("model", f"{name}, on the hub{', and in the local cache' if cached else ''}")


def check_wandb(used: bool, environment: Mapping[str, str] = os.environ) -> Line:
    """Whether W&B will be online, where the run uses it; offline is no fault."""
    if not used:
        return ok("W&B", "not used")
    if environment.get("WANDB_MODE", "").lower() in ("offline", "dryrun", "disabled"):
        return ok("W&B", f"WANDB_MODE={environment['WANDB_MODE']}")
    if environment.get("WANDB_API_KEY"):
        return ok("W&B", "an API key in WANDB_API_KEY")
    host = urlsplit(environment.get("WANDB_BASE_URL", f"https://{WANDB_HOST}")).hostname or WANDB_HOST
    with suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc(environment.get("NETRC")).authenticators(host):
            return ok("W&B", f"logged in at {host}")
    advice = "runs are recorded offline, to be sent later with wandb sync; or run `wandb login` first"
    return warning("W&B", "not logged in", advice)
