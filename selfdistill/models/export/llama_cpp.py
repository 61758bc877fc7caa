"""Finds llama.cpp: its converter, what quantises, and what loads the result. No heavy imports.

Looked through in this order: a folder that is given, the PATH, and the Python environment (the extra `gguf`). A folder
may be a checkout of llama.cpp, with what was built in `build/bin`, or a Python environment made by `make gguf`.
llama-cpp-python loads what was written, in the folder's environment or in this one. Its wheel lacks the converter, its
source archive has it:

    python -m selfdistill.models.export.llama_cpp FOLDER

fetches that archive through pip and unpacks the converter to FOLDER; without a folder, to where it is looked for in
this Python environment.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

from selfdistill.errors import UserError

CONVERTER = "convert_hf_to_gguf.py"
PACKAGE = "llama-cpp-python"
SHARE = Path("share") / "llama.cpp"  # of a Python environment
KEPT = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/", "LICENSE")
INSTALL = (
    "run `make gguf` and write export.llama_cpp=.venv-gguf, or `pip install 'selfdistill[gguf]'`, and then "
    "`python -m selfdistill.models.export.llama_cpp` or export.llama_cpp=FOLDER with a checkout of llama.cpp."
)


@dataclass(frozen=True)
class LlamaCpp:
    """What was found of llama.cpp.

    Attributes:
        converter: the folder with convert_hf_to_gguf.py.
        python: an interpreter that has llama-cpp-python; it loads the result, and quantises.
        quantise: the program llama-quantize, which quantises where it is found.
    """

    converter: Path | None
    python: str | None
    quantise: str | None

    def lacks(self) -> str | None:
        """What is missing for an export, in a sentence; None where all is there."""
        found = {
            f"its converter ({CONVERTER})": self.converter,
            "llama-cpp-python, which loads the result": self.python,
        }
        missing = [name for name, place in found.items() if place is None]
        return f"of llama.cpp, {' and '.join(missing)} cannot be found: {INSTALL}" if missing else None


def find(folder: str | None = None) -> LlamaCpp:
    """What there is of llama.cpp in a folder, or on this machine.

    Raises:
        UserError: there is no such folder.
    """
    if folder is not None:
        root = Path(folder).expanduser().absolute()
        if not root.is_dir():
            raise UserError(f"export.llama_cpp={folder}: there is no such folder.")
        places = [root, root / "bin", root / "build" / "bin"]
        converters = [root, root / "bin", root / SHARE]
        pythons = [str(root / "bin" / "python"), sys.executable]
        return LlamaCpp(
            next((place for place in converters if (place / CONVERTER).is_file()), None),
            python=next((python for python in pythons if Path(python).is_file() and _has_package(python)), None),
            quantise=shutil.which("llama-quantize", path=os.pathsep.join(map(str, places))),
        )
    on_path = shutil.which(CONVERTER)
    converters = [Path(on_path).resolve().parent] if on_path else []
    converters += [Path(sys.prefix) / SHARE]
    return LlamaCpp(
        next((place for place in converters if (place / CONVERTER).is_file()), None),
        python=sys.executable if _has_package(sys.executable) else None,
        quantise=shutil.which("llama-quantize"),
    )


@cache
def _has_package(python: str) -> bool:
    if python == sys.executable:
        try:
            version(PACKAGE)
        except PackageNotFoundError:
            return False
        return True
    asked = f"import importlib.metadata as m; m.version('{PACKAGE}')"
    return subprocess.run([python, "-c", asked], capture_output=True).returncode == 0


def unpack_converter(folder: Path) -> None:
    """Fetches the source archive of the installed llama-cpp-python and unpacks the converter to a folder.

    Raises:
        UserError: the package is not installed, or its archive cannot be had.
    """
    try:
        wanted = f"{PACKAGE}=={version(PACKAGE)}"
    except PackageNotFoundError:
        raise UserError(f"{PACKAGE} is not installed: pip install 'selfdistill[gguf]' brings it.") from None
    with TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
        done = subprocess.run([*pip, "--dest", temporary, wanted], capture_output=True, text=True)
        archives = sorted(Path(temporary).glob("*.tar.gz"))
        if done.returncode or not archives:
            said = done.stderr.strip().splitlines() or ["no archive came"]
            raise UserError(f"the source archive of {wanted} cannot be had: {said[-1]}")
        with tarfile.open(archives[0]) as archive:
            for member in archive:
                _, _, path = member.name.partition("/vendor/llama.cpp/")
                if member.isfile() and path.startswith(KEPT):
                    member.name = path
                    archive.extract(member, folder, filter="data")


if __name__ == "__main__":
    try:
        target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(sys.prefix) / SHARE
        unpack_converter(target)
        print(f"llama.cpp's converter lies in {target}")
    except UserError as refused:
        sys.exit(f"selfdistill: {refused}")
