"""A model whose parameters FSDP2 divides among the processes: each keeps a shard and gathers the others for a pass."""

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from selfdistill.models.structure import inner_model


def shard(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the memory of the tensor itself; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def give_up_gathered(model: nn.Module) -> None:
    """Makes every trained parameter of a sharded model its shard again, so that the next pass gathers it anew.

    Some modules keep what they gathered until the next backward pass, the output head among them. Without this they
    would not see that a shard was changed in the meantime. Does nothing where the model is not sharded.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule) and any(p.requires_grad for p in module.parameters()):
            module.reshard()


def share_tied(state: dict[str, Tensor], model: nn.Module) -> None:
    """Lets every name of a tied parameter have one tensor in a gathered state, which has a copy for each name.

    transformers saves a tensor once if several names share its memory, and reads the other names off the model.
    """
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state:
            state[name] = state[first.setdefault(parameter, name)]


def generate_in_step(model: nn.Module) -> None:
    """Lets each process generate for as long as one of them does, since every pass of a sharded model takes all.

    transformers does so by itself for the models that it has sharded, and this one was sharded by accelerate.
    """
    inner_model(model)._is_fsdp_managed_module = True
