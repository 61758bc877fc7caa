"""Every architecture that the tests know: padding, head, and one step against a naive computation.

python -m tests.torture architectures
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from tests.fuzz.forks import Row, counted
from tests.models.architectures import ARCHITECTURES
from tests.reference import ROOT

TESTS = ROOT / "tests" / "models" / "test_architectures.py"
# What each test looks at: the column of docs/ARCHITECTURES.md that it finds again.
COLUMNS = {"test_padding": "padding", "test_head": "head", "test_hybrid_step": "hybrid"}


def rows() -> list[Row]:
    """How often each architecture is as docs/ARCHITECTURES.md has it."""
    with TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--junitxml={results}"]
        subprocess.run([sys.executable, "-m", "pytest", *options, TESTS], cwd=ROOT, stdout=subprocess.DEVNULL)
        found = ElementTree.parse(results).getroot()
    return [
        counted(f"{column} of {len(ARCHITECTURES)} architectures", _outcomes(found, test, column))
        for test, column in COLUMNS.items()
    ]


def _outcomes(found: ElementTree.Element, test: str, column: str) -> Iterator[tuple[str, str]]:
    cases = {str(case.get("name")): case for case in found.iter("testcase")}
    for name, architecture in ARCHITECTURES.items():
        case = cases.get(f"{test}[{name}]")
        problem = "not tried" if case is None else next((child.get("message") for child in case), None)
        yield ("otherwise", f"{name}, {column}: {problem}") if problem else (getattr(architecture, column), "")
