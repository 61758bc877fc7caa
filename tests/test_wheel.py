"""What `pip install .` brings along: the configuration, the embedded model and its data."""

import subprocess
import sys
import zipfile

import pytest

from tests.reference import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, check=True, capture_output=True, cwd=ROOT)
    (file,) = folder.glob("selfdistill-*.whl")
    with zipfile.ZipFile(file) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize(
    "pattern",
    [
        "selfdistill/**/*.py",
        "hydra_plugins/*.py",
        "selfdistill/**/*.jinja",
        "conf/**/*.yaml",
        "conf/**/*.sh",
        "selfdistill/data/embedded/*.jsonl",
    ],
)
def test_the_wheel_has_every_file(wheel: set[str], pattern: str) -> None:
    files = {str(file.relative_to(ROOT)) for file in ROOT.glob(pattern)}
    files = {f"selfdistill/{name}" if name.startswith("conf/") else name for name in files}  # where conf/ is installed
    assert files
    assert files - wheel == set()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_the_wheel_has_the_embedded_model(wheel: set[str], name: str) -> None:
    assert f"selfdistill/models/embedded/{name}" in wheel


def test_the_wheel_has_the_package_alone(wheel: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"selfdistill", "hydra_plugins"}
