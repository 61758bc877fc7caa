"""What a run is called where runs are compared: its choices, its method, and the values that its sweep varies."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from selfdistill.config.conf import CONF
from selfdistill.runs.folder import RunFolder

# The groups whose options say what a run is; they are fields of its recorded configuration, and its tags.
SHOWN = ("experiment", "model", "data", "reward", "teacher")
NONE = ("null", "none")


@dataclass(frozen=True)
class Labels:
    """What Hydra knows of a run beyond its configuration.

    Attributes:
        choices: the option that was chosen of each group, nested ones with a slash.
        swept: the values of a sweep's job, such as "alpha=0.5 beta=0.04 seed=1"; empty for a single run.
    """

    choices: dict[str, str] = field(default_factory=dict)
    swept: str = ""

    @property
    def chosen(self) -> dict[str, str]:
        """The choices that are not `none` or `null`."""
        return {group: option for group, option in self.choices.items() if option not in NONE}

    @property
    def method(self) -> str | None:
        """The experiment, or the reward and the teacher that make up the run."""
        chosen = self.chosen
        parts = [chosen[group] for group in ("reward", "teacher") if group in chosen]
        return chosen.get("experiment") or "-".join(parts) or None

    @property
    def fields(self) -> dict[str, str | None]:
        """The option of each group that says what a run is; None where nothing is chosen."""
        chosen = self.chosen
        return {group: chosen.get(group) for group in SHOWN}

    @property
    def tags(self) -> list[str]:
        """GROUP=OPTION for the same groups; W&B takes 64 characters."""
        return [f"{group}={option}"[:64] for group, option in self.fields.items() if option]

    def name(self, run: RunFolder) -> str:
        """The method and the swept values for a job of a sweep, which tell its runs apart, otherwise the run's id."""
        return f"{self.method or 'run'} {self.swept}"[:128] if self.swept else run.run_id


def labels_of(folder: Path) -> Labels:
    """From `.hydra/hydra.yaml` of a run's folder, which a resumed run keeps; empty where it cannot be read."""
    try:
        known: Any = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "hydra.yaml"), resolve=False)
        hydra = known["hydra"]
        swept = hydra["job"]["override_dirname"] or "" if hydra["mode"] == "MULTIRUN" else ""
        return Labels(_made(hydra["runtime"]["choices"]), swept)
    except (OSError, YAMLError, OmegaConfBaseException, LookupError, TypeError, AttributeError):
        return Labels()


def _made(choices: Mapping[Any, Any]) -> dict[str, str]:
    """Hydra's choices without the groups that nothing was chosen of, which it keeps as None."""
    return {str(group): str(option) for group, option in choices.items() if option is not None}


def defaults(choices: dict[str, str]) -> tuple[DictConfig, dict[str, str]]:
    """The configuration with these options and nothing else said, and the options that there are without any.

    What an experiment sets counts as a difference, so experiments are left out of it.
    """
    # Within a command the search path is that of the command, with the user's own folder.
    running = GlobalHydra.instance().is_initialized()
    search_path: Any = nullcontext() if running else initialize_config_dir(str(CONF), version_base="1.3")
    with search_path:
        plain = compose("train", return_hydra_config=True)
        usual = _made(plain.hydra.runtime.choices)
        left_out = ("experiment", "debug")
        groups = [g for g, o in choices.items() if usual.get(g) != o and g not in left_out and "hydra/" not in g]
        try:
            return compose("train", [f"{group}={choices[group]}" for group in groups]), usual
        except HydraException:
            return compose("train"), usual
