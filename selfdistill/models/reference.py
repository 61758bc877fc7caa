"""The frozen reference of the KL penalty, for models that exist in memory only."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn


@contextmanager
def loadable(model: Any, needed: bool) -> Iterator[None]:
    """Inside, `model` can be loaded from where its config says that it came from.

    In full training TRL builds the reference by loading that place again. A model that was built or changed in memory
    has none: it is written to a temporary folder for as long as the loading takes.
    """
    config = getattr(model, "config", None)
    source = getattr(config, "_name_or_path", None)
    in_memory = isinstance(model, nn.Module) and not hasattr(model, "peft_config")
    # A relative name may be the hub's.
    found = source and (not Path(source).is_absolute() or (Path(source) / "config.json").exists())
    if not needed or not in_memory or found:
        yield
        return
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config._name_or_path = folder
        try:
            yield
        finally:
            config._name_or_path = source


def copy_weights(model: nn.Module, reference: nn.Module) -> None:
    """Makes the reference what the model is in memory, whatever was loaded from disk."""
    reference.load_state_dict(model.state_dict())
