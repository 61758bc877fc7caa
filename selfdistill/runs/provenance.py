"""Where a run comes from: `provenance.json` and `diff.patch` in its folder, and the configuration that repeats it."""

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from selfdistill import config
from selfdistill.config.conf import PACKAGE
from selfdistill.config.overrides import key_of
from selfdistill.config.permissions import granted_again
from selfdistill.config.secrets import Redactor
from selfdistill.data.sources import EMBEDDED_PREFIX, embedded_file
from selfdistill.errors import UserError
from selfdistill.models.location import files_of
from selfdistill.runs.folder import RunFolder

PROVENANCE, DIFF = "provenance.json", "diff.patch"
LONGEST_DIFF = 5_000_000  # characters
GIT_TIMEOUT_S = 10.0
# What may differ in a repeated run: where it goes, and what it is called.
FREE = ("repeat", "output_dir", "name", "group", "tags", "check", "logger")
DECISIVE = (
    "selfdistill", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "tokenizers", "vllm",
)  # fmt: skip


def provenance_files(folder: Path, cfg: DictConfig, run: config.Run) -> dict[str, str]:
    """Files that say where a run comes from: their content by name, for a run's folder of the given path.

    They hold commit and changes, versions, hardware, fingerprints of data and model, seed and command line.
    """
    redactor = Redactor(cfg)
    command = redactor.text(shlex.join(redactor.arguments(sys.orig_argv)))
    repositories = {"folder": _repository(Path.cwd()), "selfdistill": _repository(PACKAGE)}
    if repositories["folder"] == repositories["selfdistill"]:
        del repositories["selfdistill"]
    diffs = [changes for repository in repositories.values() if repository and (changes := repository.pop("changes"))]
    found = {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "repeat": f"selfdistill train repeat={shlex.quote(str(folder))}",
        "folder": os.getcwd(),
        "seed": run.seed,
        "git": repositories,
        "data": data_fingerprints(run),
        "model": model_fingerprints(run),
        "hardware": _hardware(),
        "versions": _versions(),
    }
    changes = {DIFF: redactor.text("\n".join(diffs))} if diffs else {}
    return {PROVENANCE: json.dumps(found, indent=2, ensure_ascii=False) + "\n", **changes}


def repeated_config(cfg: DictConfig, overrides: Sequence[str]) -> tuple[DictConfig, config.Run, list[str]]:
    """The configuration of the run that `repeat` names, for a new run, and what is not as it was then.

    Raises:
        UserError: not a run's folder, a configuration that does not pass or needs a grant, or another key beside it.
    """
    folder = RunFolder.open(Path(cfg.repeat), write=False)
    saved = folder.config
    again = granted_again(saved, cfg, overrides, f"repeat={cfg.repeat}")
    for override in overrides:
        key = key_of(override)
        if key not in (*FREE, *again):
            raise UserError(
                f"{key} cannot be changed when a run is repeated: its configuration is in {cfg.repeat}/config.yaml. "
                f"Beside repeat there may be {', '.join(FREE[1:])}."
            )
        if key in FREE:
            saved[key] = cfg[key]
    if saved.get("export"):
        saved.export.push_to = None  # where it went is not this run's to write to
    saved.repeat, saved.resume, saved.check = cfg.repeat, None, cfg.check
    if saved.name is None:  # a run's id is its time, its name and four letters
        saved.name = re.sub(r"^\d{8}-\d{6}-|-[0-9a-f]{4}$", "", folder.run_id)
    try:
        run = config.check(saved)
    except UserError as error:
        raise UserError(f"{cfg.repeat}/config.yaml: {error}") from None
    return saved, run, differences(folder.path, run)


def differences(folder: Path, run: config.Run) -> list[str]:
    """What is not as it was when the run in this folder was made: packages, data, model, commit."""
    try:
        before = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [f"{folder / PROVENANCE} cannot be read: whether packages and data are the same is not known"]
    versions = _versions()
    notes = [
        f"{name} {versions.get(name, 'is not installed')} here, {there} there"
        for name in config_packages(before.get("versions") or {})
        if versions.get(name) != (there := before["versions"][name])
    ]
    for what, now in (("data", data_fingerprints(run)), ("model", model_fingerprints(run))):
        for name, then in (before.get(what) or {}).items():
            if now.get(name) != then:
                notes.append(f"{what}: {name} is another file than it was")
    return notes


def config_packages(versions: Mapping[str, str]) -> list[str]:
    """The packages on which a run's numbers depend."""
    return [name for name in DECISIVE if name in versions]


def data_fingerprints(run: config.Run) -> dict[str, dict[str, Any]]:
    """Size and hash of every data file, by its path as configured; a hub dataset has neither."""
    paths = [run.data.get("path"), run.data.get("eval_path"), run.model.retention_path]
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        if not isinstance(path, str):
            continue
        if path.startswith(EMBEDDED_PREFIX):
            found[path] = fingerprint(embedded_file(path.removeprefix(EMBEDDED_PREFIX), "data.path"))
        elif Path(path).expanduser().is_file():
            found[path] = fingerprint(Path(path).expanduser())
    return found


def model_fingerprints(run: config.Run) -> dict[str, dict[str, Any]]:
    """Size and hash of every file of the model that a run starts from, by its name; empty for one on a hub."""
    return {file.name: fingerprint(file) for file in files_of(run.model.name)}


def fingerprint(file: Path) -> dict[str, Any]:
    """Size and BLAKE2 hash of a file."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16))
    return {"bytes": file.stat().st_size, "blake2b": digest.hexdigest()}


def _repository(place: Path) -> dict[str, Any] | None:
    """Commit of the repository that a folder lies in, and what differs from it; None outside of one."""
    try:
        commit = _git(place, "rev-parse", "HEAD").strip()
        changes = _git(place, "diff", "HEAD")
        untracked = _git(place, "ls-files", "--others", "--exclude-standard", ":/").splitlines()
        root = _git(place, "rev-parse", "--show-toplevel").strip()
    except (OSError, subprocess.SubprocessError):
        return None
    cut = len(changes) > LONGEST_DIFF
    return {
        "root": root,
        "commit": commit,
        "changed": bool(changes),
        "diff_cut": cut,
        "untracked": untracked[:100],
        "changes": changes[:LONGEST_DIFF],
    }


def _git(place: Path, *arguments: str) -> str:
    command = ["git", "-C", str(place), *arguments]
    done = subprocess.run(command, capture_output=True, check=True, timeout=GIT_TIMEOUT_S)
    return done.stdout.decode("utf-8", "replace")


def _hardware() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _versions() -> dict[str, str]:
    """Every installed package, Python among them."""
    found = {"python": platform.python_version()}
    for distribution in distributions():
        if name := distribution.metadata["Name"]:
            found.setdefault(name.lower(), distribution.version)
    return dict(sorted(found.items()))
