"""The frozen reference of the KL penalty, for models that exist in memory only."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel


@contextmanager
def loadable(model: str | nn.Module, needed: bool) -> Iterator[None]:
    """Inside, the folder or name that the model's config gives as its origin can be loaded.

    In full training TRL builds the reference by loading that origin again. A model that was built in memory has none,
    so it is written to a temporary folder for as long as the loading takes. Of several processes transformers lets the
    main one alone write, so that all use its folder.
    """
    if not needed or not isinstance(model, PreTrainedModel):  # a name, or a PEFT model, whose reference is its base
        yield
        return
    source = model.config.name_or_path
    # A relative name may be the hub's.
    if source and (not Path(source).is_absolute() or (Path(source) / "config.json").exists()):
        yield
        return
    processes = PartialState()
    with ExitStack() as at_end:
        folder = [at_end.enter_context(TemporaryDirectory()) if processes.is_main_process else ""]
        if processes.num_processes > 1:
            broadcast_object_list(folder)
        model.save_pretrained(folder[0])
        processes.wait_for_everyone()
        model.config.name_or_path = folder[0]
        try:
            yield
        finally:
            model.config.name_or_path = source
        processes.wait_for_everyone()  # the folder is there until all have loaded it


def copy_weights(model: nn.Module, reference: nn.Module) -> None:
    """Give the reference the weights that the model has in memory, whatever was loaded from disk.

    A reference that FSDP2 has sharded takes those of the main process.
    """
    if isinstance(reference, FSDPModule):
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(reference, model.state_dict(), options=options)
    else:
        reference.load_state_dict(model.state_dict())
