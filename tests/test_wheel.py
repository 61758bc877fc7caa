"""What `pip install .` brings along: the configuration, the embedded model and its data."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "selfdistill"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in the wheel."""
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, check=True, capture_output=True, cwd=ROOT)
    (file,) = folder.glob("selfdistill-*.whl")
    with zipfile.ZipFile(file) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("pattern", ["*.py", "conf/**/*.yaml", "data/embedded/*.jsonl"])
def test_the_wheel_has_every_file(wheel: set[str], pattern: str) -> None:
    files = {str(file.relative_to(ROOT)) for file in PACKAGE.rglob(pattern)}
    assert files
    assert files - wheel == set()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_the_wheel_has_the_embedded_model(wheel: set[str], name: str) -> None:
    assert f"selfdistill/models/embedded/{name}" in wheel


def test_the_wheel_has_the_package_alone(wheel: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"selfdistill"}
