"""Finds what a `_target_` names, checks that it may be built and that its arguments fit, and builds it."""

import functools
import importlib
import inspect
import re
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from selfdistill.config.kinds import REWARD, check_kind, kind_of
from selfdistill.config.reward_calls import check_call
from selfdistill.config.schema import Run
from selfdistill.config.secrets import escaped
from selfdistill.config.suggestions import closest
from selfdistill.config.values import as_hinted, mismatch
from selfdistill.errors import UserError, first_line, quoted

# Whole libraries are not trusted: torch.load, transformers.pipeline and many others run code that a file brings.
TRUSTED = ("selfdistill", "trl.rewards")
PASSED_LATER = {"tokenizer"}  # arguments that `make` is given beside the configuration


def targets(node: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping in plain mappings and lists that names a `_target_`, with its key, outermost first."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from targets(value, f"{path}[{index}]")


def check_trust(key: str, target: Any, prefixes: Iterable[str]) -> None:
    """Raises UserError unless `target` is a dotted path below a module that is trusted."""
    if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", target):
        raise UserError(
            f"{key}._target_={quoted(target)}: write a dotted path to a class or function, e.g. my_module.MyReward."
        )
    trusted = (*TRUSTED, *prefixes)
    if not any(target.startswith(f"{prefix.rstrip('.')}.") for prefix in trusted):
        raise UserError(
            f"{key}._target_={target}: only {', '.join(trusted)} are trusted. To allow it, if you know what it does: "
            f"trusted_prefixes=[{target.split('.')[0]}]."
        )


def check_targets(run: Run, trainer_arguments: Collection[str]) -> None:
    """Checks the kind and the arguments of everything that the run will build, without building anything.

    Args:
        trainer_arguments: what `training.arguments` may hold.

    Raises:
        UserError: what cannot stand where it does, or an argument that is unknown, missing or of the wrong type.
    """
    for key, node in targets(asdict(run)):
        check_target(key, node)
    for argument in run.training.arguments:
        if argument not in trainer_arguments:
            raise UserError(
                f"training.arguments.{argument}: trl.GRPOConfig takes no such argument; "
                f"{closest(argument, trainer_arguments)}"
            )


def check_target(key: str, node: Mapping[str, Any]) -> None:
    """Raises UserError unless what a `_target_` names is of the kind that stands there, and takes its arguments."""
    target = find(key, node["_target_"])
    check_kind(key, node, target)
    if kind_of(key) is REWARD:
        check_call(key, node, target)
    bind(key, node)


def find(key: str, name: str) -> Callable[..., Any]:
    """What a dotted name stands for, found as Hydra finds it: attribute by attribute, modules imported on the way.

    A name is trusted by its first parts, and what it stands for must be at home there: `mine.system`, where mine.py
    says `from os import system`, is a function of `posix`.

    Raises:
        UserError: there is no such thing, it cannot be called, or it comes from another package than its name says.
    """
    found: Any = None
    parts = name.split(".")
    for count, part in enumerate(parts, start=1):
        if hasattr(found, part):
            found = getattr(found, part)
            continue
        module, above = ".".join(parts[:count]), found
        try:
            found = importlib.import_module(module)
        except Exception as error:  # whatever a user's module raises
            if not isinstance(error, ModuleNotFoundError):
                reason = f"{module} cannot be imported: {type(error).__name__}: {error}"
            elif not f"{module}.".startswith(f"{error.name}."):
                reason = f"{module} cannot be imported: {error}."
            elif above is None:
                reason = f"there is no module {part} here. Is its folder on PYTHONPATH, or is it installed?"
            else:
                known = closest(part, [n for n in dir(above) if not n.startswith("_")])
                reason = f"{getattr(above, '__name__', above)} has no {part}; {known}"
            raise UserError(f"{key}._target_={name}: {reason}") from None
    if not callable(found):
        raise UserError(f"{key}._target_={name} is no class or function: name one that is in it.")
    _check_home(key, name, found)
    return found  # type: ignore[no-any-return]


def _check_home(key: str, name: str, found: Callable[..., Any]) -> None:
    """Raises UserError where the module that defines a class or function is of another package than its name says."""
    inner: Any = found
    while isinstance(inner, functools.partial):
        inner = inner.func
    if not (inspect.isclass(inner) or inspect.isroutine(inner)):
        inner = type(inner)  # an object that can be called
    home = getattr(inner, "__module__", None)
    root = "trl.rewards" if name.startswith("trl.rewards.") else name.split(".")[0]
    if not isinstance(home, str) or not f"{home}.".startswith(f"{root}."):
        its_name = getattr(inner, "__qualname__", type(inner).__name__)
        where = f"{home}.{its_name}" if isinstance(home, str) else f"{its_name}, which belongs to no module"
        raise UserError(
            f"{key}._target_={name} is {where}, and not at home in {root}: name a class or function that {root} "
            "itself defines."
        )


def declares(key: str, node: Any, attribute: str) -> bool:
    """Whether what a `_target_` names has this attribute and it is true; a function or a user's class may lack it."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        return False
    return bool(getattr(find(key, node["_target_"]), attribute, False))


def bind(key: str, node: Mapping[str, Any]) -> None:
    """Raises UserError unless a `_target_` takes the arguments that stand beside it, and needs no others."""
    name, target = node["_target_"], find(key, node["_target_"])
    parameters = _parameters(target)
    if parameters is None:
        return
    arguments = {str(argument): value for argument, value in node.items() if not str(argument).startswith("_")}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for argument, value in arguments.items():
        if argument not in parameters and not open_ended:
            known = closest(argument, parameters.keys() - PASSED_LATER)
            raise UserError(f"{key}.{argument}: {name} takes no such argument; {known}")
        will_be_built = isinstance(value, Mapping) and "_target_" in value
        hint = Any if will_be_built or argument not in parameters else _hint(parameters[argument], target)
        if wanted := mismatch(value, hint):
            raise UserError(f"{key}.{argument}={quoted(value)}: write {wanted}.")
    if node.get("_partial_") or "_args_" in node:
        return
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = {n for n, p in parameters.items() if p.default is p.empty and p.kind in named}
    for argument in sorted(required - arguments.keys() - PASSED_LATER):
        raise UserError(f"{key}.{argument} is missing: {name} needs it; write {key}.{argument}=…")


def _parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """None for what has no signature that can be read, such as some functions written in C."""
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None


def _hint(parameter: inspect.Parameter, target: Callable[..., Any]) -> Any:
    """A parameter's type; Any where its annotation names something that only a type checker can find."""
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)  # type: ignore[misc]
    annotated = types.SimpleNamespace(__annotations__={"it": parameter.annotation})
    try:
        return get_type_hints(annotated, getattr(function, "__globals__", {}))["it"]
    except Exception:  # an annotation may be any expression
        return Any


def _as_hinted(node: Any, key: str) -> Any:
    """A copy of plain mappings and lists, with the arguments of every `_target_` in the type that it annotates."""
    if isinstance(node, list):
        return [_as_hinted(item, key) for item in node]
    if not isinstance(node, Mapping):
        return node
    copy = {name: _as_hinted(value, f"{key}.{name}") for name, value in node.items()}
    if "_target_" in node:
        target = find(key, node["_target_"])
        for name, parameter in (_parameters(target) or {}).items():
            if name in copy:
                copy[name] = as_hinted(copy[name], _hint(parameter, target))
    return copy


def make(node: Mapping[str, Any] | None, key: str, **later: Any) -> Any:
    """What the group `key` stands for; None where it is null.

    Args:
        later: arguments that no configuration can hold (`PASSED_LATER`), given where the target names them.

    Raises:
        UserError: the target refuses its arguments.
    """
    if node is None:
        return None
    parameters = _parameters(find(key, node["_target_"])) or {}
    given = {name: value for name, value in later.items() if name in parameters}
    literal = escaped(
        escaped(_as_hinted(node, key))
    )  # Hydra would resolve a `${` in the text, and the result once more
    try:
        # "all": plain lists and dictionaries
        built = instantiate(literal | {"_partial_": True} if given else literal, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from error
        raise UserError(f"{key} cannot be built: {first_line(cause)}") from error
    return built(**given) if given else built
