"""Keeps API keys and passwords out of the files that a run leaves behind."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from selfdistill.errors import MASK, without_passwords

_SECRET_KEY = re.compile(
    r"(^|_)(api_?key|secret|secrets|password|passwd|credential|credentials|authorization)($|_)"
    r"|^(hf|hub|push_to_hub|access|auth|api|bearer|write|refresh)_token$|^token$",
    re.IGNORECASE,
)
# Shorter values are left alone outside of their own key: they would mask ordinary words.
_SHORTEST_IN_TEXT = 8


# `key: value` within the braces of one argument, such as teacher={api_key: x}
_IN_BRACES = re.compile(r"([\w-]+)(\s*:\s*)('[^']*'|\"[^\"]*\"|[^,{}\[\]\s]+)")
_ADDRESS = re.compile(r"\w://([^/\s@?#'\"]+)@")


def _masked_pair(pair: re.Match[str]) -> str:
    return f"{pair[1]}{pair[2]}{MASK}" if is_secret_key(pair[1]) else pair[0]


def _hides_nothing(raw: str) -> bool:
    """Whether what stands before the `@` of an address is a variable of the environment and nothing else."""
    user = _ADDRESS.search(raw)
    return user is None or re.fullmatch(r"(\w+:)?\$\{oc\.env:\w+\}(:\$\{oc\.env:\w+\})?", user[1]) is not None


def masked_keys(config: DictConfig) -> list[str]:
    """The keys whose values were masked when this configuration was written, and so are lost."""
    found: list[str] = []

    def visit(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                visit(item, f"{key}.{name}" if key else str(name))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                visit(item, f"{key}[{index}]")
        elif isinstance(value, str) and (value == MASK or f"://{MASK}@" in value):
            found.append(key)

    visit(OmegaConf.to_container(config, resolve=False), "")
    return found


class _Interpolation(str):
    """Text that stays an interpolation in the written configuration."""


class Redactor:
    """Masks the secrets of one configuration.

    A secret is a text under a key such as `api_key`, `password`, `hub_token` or `authorization`, and what stands before
    the `@` of an address (`http://user:password@host`). One that the user wrote as `${oc.env:NAME}` keeps that form, so
    that the configuration can be used again.

    Attributes:
        config: the configuration as plain dicts and lists, resolved, secrets masked everywhere.
    """

    def __init__(self, config: DictConfig) -> None:
        self._secrets: set[str] = set()
        resolved = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
        raw = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
        masked = self._mask(resolved, raw)
        self.config: dict[str, Any] = _each_text(
            masked, lambda text: text if isinstance(text, _Interpolation) else self.text(text)
        )

    def yaml(self) -> str:
        """The masked configuration as YAML that OmegaConf reads back to the same values."""
        return OmegaConf.to_yaml(OmegaConf.create(escaped(self.config)))

    def text(self, text: str) -> str:
        """`text` without the configuration's secrets."""
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, MASK)
        return without_passwords(text)

    def arguments(self, arguments: Sequence[str]) -> list[str]:
        """Command-line arguments, those that set a secret key masked."""
        masked = []
        for argument in arguments:
            key, equals, _ = argument.partition("=")
            is_secret = bool(equals) and is_secret_key(re.split(r"[.@/+~]", key)[-1])
            masked.append(f"{key}={MASK}" if is_secret else self.text(_IN_BRACES.sub(_masked_pair, argument)))
        return masked

    def _mask(self, value: Any, raw: Any) -> Any:
        if isinstance(value, dict):
            raw = raw if isinstance(raw, dict) else {}
            return {key: self._mask_item(key, item, raw.get(key)) for key, item in value.items()}
        if isinstance(value, list):
            raw = raw if isinstance(raw, list) else [None] * len(value)
            return [self._mask(item, raw_item) for item, raw_item in zip(value, raw, strict=True)]
        return value

    def _mask_item(self, key: Any, value: Any, raw: Any) -> Any:
        if isinstance(value, str) and (user := _ADDRESS.search(value)):
            for secret in user[1].split(":")[-1], user[1]:
                if len(secret) >= _SHORTEST_IN_TEXT:
                    self._secrets.add(secret)
        if not (isinstance(value, str) and value and value not in ("???", MASK) and is_secret_key(str(key))):
            kept = isinstance(raw, str) and "${oc.env:" in raw and without_passwords(value) != value
            return _Interpolation(raw) if kept and _hides_nothing(raw) else self._mask(value, raw)
        if len(value) >= _SHORTEST_IN_TEXT:
            self._secrets.add(value)
        from_environment = isinstance(raw, str) and raw.startswith("${oc.env:") and raw.count("${") == 1
        return _Interpolation(self.text(raw)) if from_environment else MASK


def masked(values: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping of arguments whose secrets are masked: texts under secret keys, and passwords in addresses."""
    return {
        key: value if not isinstance(value, str) else MASK if is_secret_key(key) else without_passwords(value)
        for key, value in values.items()
    }


def without_secrets(overrides: Sequence[str]) -> list[str]:
    """A command line's keys, secrets masked."""
    return Redactor(OmegaConf.create()).arguments(overrides)


def escaped(value: Any) -> Any:
    """Resolved text may hold `${`, which must not be resolved again when the file is read."""

    def escape(text: str) -> str:
        return str(text) if isinstance(text, _Interpolation) else re.sub(r"(\\*)\$\{", r"\1\1\\${", text)

    return _each_text(value, escape)


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Plain mappings and lists with every text in them changed."""
    if isinstance(value, dict):
        return {key: _each_text(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_each_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def is_secret_key(key: str) -> bool:
    """Whether a value under this key is a secret; `api_key_env` names a variable, and is none."""
    return not key.endswith("_env") and bool(_SECRET_KEY.search(key.replace("-", "_")))
