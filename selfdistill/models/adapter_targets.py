"""Whether an adapter finds the layers that it is to be put on."""

import re
from typing import TYPE_CHECKING

from selfdistill.config.suggestions import closest
from selfdistill.errors import UserError

if TYPE_CHECKING:
    from torch import nn


def check_target_modules(model: "nn.Module", wanted: str | list[str]) -> None:
    """Checks `model.lora.target_modules` as PEFT reads it: the last parts of names, or one regular expression.

    Raises:
        UserError: a name that is no layer's, or an expression that matches none.
    """
    names = [name for name, _ in model.named_modules() if name]
    if wanted == "all-linear":
        return
    if isinstance(wanted, str):
        try:
            missing = [] if any(re.fullmatch(wanted, name) for name in names) else [wanted]
        except re.error as error:
            raise UserError(f"model.lora.target_modules={wanted} is no regular expression: {error}.") from None
    else:
        missing = [one for one in wanted if not any(name == one or name.endswith(f".{one}") for name in names)]
        missing = missing or ([] if wanted else ["[]"])
    if missing:
        known = {name.rpartition(".")[2] for name in names} - {str(number) for number in range(1000)}
        raise UserError(
            f"model.lora.target_modules: the model has no layer {missing[0]}; {closest(missing[0], known)} "
            "(all-linear takes every linear layer.)"
        )
