"""Whether a reward of the user's own can be called as rewards are, judged by its signature, before anything loads."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from selfdistill.errors import UserError

CALL = "reward(prompts=…, completions=…, completion_ids=…, **columns)"
GIVEN = ("prompts", "completions", "completion_ids")


def check_call(key: str, node: Mapping[str, Any], target: Any) -> None:
    """Checks a `_target_` that stands in the place of a reward.

    Args:
        key: where it stands in the configuration.
        target: what `node["_target_"]` names.

    Raises:
        UserError: a class that would be called instead of built, a function that would be called once instead of
            for each batch, a class that cannot be called, or a signature that does not take what a reward is given.
    """
    name, is_partial, is_class = node["_target_"], bool(node.get("_partial_")), inspect.isclass(target)
    if is_class and is_partial:
        raise UserError(f"{key}._target_={name} is a class, which is built once: write {key}._partial_=false.")
    if not is_class and not is_partial:
        if _takes(target, GIVEN[:2]):  # otherwise it is a function that makes a reward
            raise UserError(f"{key}._target_={name} is a function, which each batch calls: write {key}._partial_=true.")
        return
    if is_class and not any("__call__" in vars(base) for base in target.__mro__):
        raise UserError(f"{key}._target_={name} is a class without __call__: it is called as {CALL}.")
    called = target.__call__ if is_class else target
    parameters = _parameters(called)
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    missing = [argument for argument in GIVEN if argument not in parameters]
    lacks = f"it does not take {', '.join(missing)}" if missing else "it does not take the data's columns"
    raise UserError(f"{key}._target_={name} is called as {CALL}, and {lacks}: add **columns to its parameters.")


def _takes(function: Callable[..., Any], names: tuple[str, ...]) -> bool:
    parameters = _parameters(function) or {}
    return all(name in parameters for name in names)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # what is written in C
        return None
