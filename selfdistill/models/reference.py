"""The frozen reference of the KL penalty, for models that exist in memory only."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn
from transformers import PreTrainedModel


@contextmanager
def loadable(model: str | nn.Module, needed: bool) -> Iterator[None]:
    """Inside, the folder or name that the model's config gives as its origin can be loaded.

    In full training TRL builds the reference by loading that origin again. A model that was built in memory has none,
    so it is written to a temporary folder for as long as the loading takes.
    """
    if not needed or not isinstance(model, PreTrainedModel):  # a name, or a PEFT model, whose reference is its base
        yield
        return
    source = model.config.name_or_path
    # A relative name may be the hub's.
    if source and (not Path(source).is_absolute() or (Path(source) / "config.json").exists()):
        yield
        return
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.config.name_or_path = folder
        try:
            yield
        finally:
            model.config.name_or_path = source


def copy_weights(model: nn.Module, reference: nn.Module) -> None:
    """Give the reference the weights that the model has in memory, whatever was loaded from disk."""
    reference.load_state_dict(model.state_dict())
