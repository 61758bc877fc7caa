"""What `hydra.*` may say: Hydra builds its callbacks and plugins before the run's own checks, so they are checked here.

Keys that would have no effect on a run are refused as well, with what to write instead.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from selfdistill.config.overrides import key_of
from selfdistill.config.targets import check_trust, find, targets
from selfdistill.errors import UserError, quoted

# Where Hydra's launchers and sweepers, and the parts that these are made of, are at home.
PLUGINS = ("hydra_plugins.", "hydra._internal.core_plugins.", "optuna.samplers.", "optuna.pruners.")
OURS = "selfdistill."
LOGGING = ("logging.", "colorlog.")
INSTEAD = {
    "hydra.job.name": "name=NAME names the run",
    "hydra.job.chdir": "a run writes to its own folder, whatever the current one is: see output_dir",
    "hydra.verbose": "a run's own log is in its folder",
    "hydra.output_subdir": "a run's folder has .hydra in it; write hydra.run.dir=FOLDER for another folder",
    "hydra.job_logging": "a run keeps its own log in its folder",
    "hydra.hydra_logging": "a run keeps its own log in its folder",
}


def check_composed(cfg: DictConfig) -> None:
    """Checks the node `hydra` of a configuration that was just composed.

    Raises:
        UserError: something would be built that is neither a plugin of Hydra's nor ours, or a key has no effect.
    """
    hydra = cfg.hydra
    overrides: Any = OmegaConf.to_container(hydra.overrides.hydra)  # their interpolations stay as they are
    for override in overrides:
        key = key_of(str(override)).replace("/", ".").split("@")[0]
        for refused, instead in INSTEAD.items():
            if key == refused or key.startswith(f"{refused}."):
                raise UserError(f"{key} has no effect here: {instead}.")
    if hydra.output_subdir is not None:
        raise UserError(f"hydra.output_subdir has no effect here: {INSTEAD['hydra.output_subdir']}.")
    for name in ("job_logging", "hydra_logging"):
        _check_logging(f"hydra.{name}", OmegaConf.to_container(hydra[name]))
    for place in hydra.searchpath:
        if str(place).startswith("file://") and not Path(str(place).removeprefix("file://")).is_dir():
            raise UserError(f"hydra.searchpath: there is no folder {str(place).removeprefix('file://')}.")
    built: Any = {name: OmegaConf.to_container(hydra[name]) for name in ("callbacks", "launcher", "sweeper")}
    for key, node in targets(built, "hydra"):
        _check_target(key, node)
    # The optuna sweeper calls what this names.
    if extender := (built["sweeper"] or {}).get("custom_search_space"):
        check_trust("hydra.sweeper.custom_search_space", extender, cfg.get("trusted_prefixes") or [])
        find("hydra.sweeper.custom_search_space", extender)


def _check_target(key: str, node: Mapping[str, Any]) -> None:
    name = node["_target_"]
    if key.startswith("hydra.callbacks"):
        if not (isinstance(name, str) and name.startswith(OURS) and _is_class(key, name, Callback)):
            raise UserError(f"{key}._target_={quoted(name)}: only selfdistill's own callbacks are run.")
    elif not (isinstance(name, str) and name.startswith(PLUGINS) and _is_class(key, name, object)):
        raise UserError(f"{key}._target_={quoted(name)}: only Hydra's launchers and sweepers can stand here.")


def _check_logging(key: str, node: Any) -> None:
    """Python's logging builds whatever stands under `()` and `class`."""
    if not isinstance(node, Mapping):
        return
    for name, value in node.items():
        if name == "()" or (name == "class" and not str(value).startswith(LOGGING)):
            raise UserError(f"{key}.{name}={quoted(value)}: only Python's own logging can stand here.")
        _check_logging(f"{key}.{name}", value)


def _is_class(key: str, name: str, kind: type) -> bool:
    found = find(key, name)
    return inspect.isclass(found) and issubclass(found, kind)


def _more_is_better() -> None:
    """Optuna maximises unless told otherwise: a run returns its accuracy, and the plugin itself would minimise it."""
    store = ConfigStore.instance()
    if "optuna.yaml" in store.list("hydra/sweeper"):
        node = store.load("hydra/sweeper/optuna.yaml").node
        node.direction = "maximize"
        store.store(group="hydra/sweeper", name="optuna", node=node, provider="selfdistill")


@contextmanager
def guarded_composition() -> Iterator[None]:
    """Has Hydra check all that it composes: it has no hook between that and what it then builds and calls itself."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    load = ConfigLoaderImpl.load_configuration

    @wraps(load)
    def checked(*args: Any, **kwargs: Any) -> DictConfig:
        _more_is_better()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="provider=hydra.searchpath")  # said as an error below
            cfg = load(*args, **kwargs)
        check_composed(cfg)
        return cfg

    ConfigLoaderImpl.load_configuration = checked  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = load  # type: ignore[method-assign]
