"""Keeps API keys and passwords out of the files that a run leaves behind."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

MASK = "***"

_SECRET_KEY = re.compile(
    r"(^|_)(api_?key|secret|secrets|password|passwd|credential|credentials|authorization)($|_)"
    r"|^(hf|hub|access|auth|api|bearer|write)_token$|^token$",
    re.IGNORECASE,
)
# Shorter values are left alone outside of their own key: they would mask ordinary words.
_SHORTEST_IN_TEXT = 8


class _Interpolation(str):
    """Text that stays an interpolation in the written configuration."""


class Redactor:
    """Masks the secrets of one configuration.

    A secret is a text under a key such as `api_key`, `password`, `hub_token` or `authorization`. One that the user
    wrote as `${oc.env:NAME}` keeps that form, so that the configuration can be used again.

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
        return text

    def arguments(self, arguments: Sequence[str]) -> list[str]:
        """Command-line arguments, those that set a secret key masked."""
        masked = []
        for argument in arguments:
            key, equals, _ = argument.partition("=")
            is_secret = bool(equals) and is_secret_key(re.split(r"[.@/+~]", key)[-1])
            masked.append(f"{key}={MASK}" if is_secret else argument)
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
        if not (isinstance(value, str) and value and value not in ("???", MASK) and is_secret_key(str(key))):
            return self._mask(value, raw)
        if len(value) >= _SHORTEST_IN_TEXT:
            self._secrets.add(value)
        from_environment = isinstance(raw, str) and raw.startswith("${oc.env:") and raw.count("${") == 1
        return _Interpolation(self.text(raw)) if from_environment else MASK


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
    """Whether a value under this key is a secret."""
    return bool(_SECRET_KEY.search(key.replace("-", "_")))
