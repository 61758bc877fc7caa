"""The house keeps its order: imports point one way between the rooms, and no file outgrows its room."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.reference import ROOT

PACKAGE = ROOT / "selfdistill"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the ground up. A room imports from its own floor and from those below.
FLOORS: tuple[set[str], ...] = (
    {"errors", "rollout", "limits", "statistics", "goals", "files", "text", "tokens"},
    {"losses"},
    {"config"},
    {"data", "models", "rewards", "teachers", "evaluation", "machine", "comparison"},
    {"training"},
    {"runs"},
    {"train", "export", "doctor", "generate_data", "compare", "workspace", "__main__"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports() -> dict[str, dict[str, str]]:
    """The rooms that each room imports, each with a file that does; those for type checkers alone are left out."""
    found: dict[str, dict[str, str]] = {room: {} for room in FLOOR_OF}
    for file in FILES:
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        typing_only = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or id(node) in typing_only or node.module is None:
                continue
            modules = [node.module] if "." in node.module else [f"{node.module}.{alias.name}" for alias in node.names]
            for module in modules:
                if module.startswith("selfdistill.") and room_of(module) in FLOOR_OF and room_of(module) != room:
                    found[room].setdefault(room_of(module), str(file.relative_to(ROOT)))
    return found


def test_every_file_has_a_room() -> None:
    rooms = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in FILES}
    assert rooms - {"__init__"} == set(FLOOR_OF)


def test_imports_point_one_way() -> None:
    arrows = imports()
    upward = {
        f"{room} imports {other}, which is above it ({file})"
        for room, others in arrows.items()
        for other, file in others.items()
        if FLOOR_OF[other] > FLOOR_OF[room]
    }
    assert not upward
    assert list(TopologicalSorter({room: others.keys() for room, others in arrows.items()}).static_order())


def test_losses_import_nothing_of_ours_but_the_ground_floor() -> None:
    assert imports()["losses"].keys() == {"errors", "limits"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_stay_readable(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 500
