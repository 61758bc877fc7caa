"""The parts of an override as Hydra's command line has it: `alpha=0.5`, `+reward@eval.scorer=regex`, `~teacher`."""


def key_of(override: str) -> str:
    """The key, without the marks for adding and removing; a group that has a package keeps it."""
    return key_and_value(override)[0]


def key_and_value(override: str) -> tuple[str, str]:
    """The key as `key_of` gives it, and the value as it was written; empty where the override has none."""
    key, _, value = override.lstrip("+~").partition("=")
    return key, value
