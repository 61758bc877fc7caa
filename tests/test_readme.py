"""Every command and every Python block of the pages, as it stands there. A command that no rule covers fails."""

import ast
import importlib
import inspect
import json
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from selfdistill import compare, doctor, export, generate_data, workspace
from selfdistill.comparison import charts
from selfdistill.config import checks
from selfdistill.models.loading import load_model, resolve
from tests.command import command
from tests.comparison.synthetic import write_sweep
from tests.teachers.server.stub_server import StubServer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "experiments").rglob("README.md"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PROGRAMS = r"(?:python|pip|make|git|vllm|accelerate|torchrun|eval|selfdistill|docker|hf)"


def blocks(page: Path, *languages: str) -> list[str]:
    return [
        text for name, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S) if name in languages
    ]


def commands(page: Path) -> list[str]:
    """The lines of the page's shell blocks without their comments, and the commands within its sentences."""
    lines = "\n".join(blocks(page, "", "bash")).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    inline = re.findall(rf"`((?:[A-Z_]+=\S+ )*{PROGRAMS} [^`]+)`", prose)
    return [line for line in (re.split(r"\s+#", line)[0].strip() for line in (*lines, *inline)) if line]


COMMANDS = [(page, line) for page in PAGES for line in dict.fromkeys(commands(page))]
SWEEPS = re.compile(r"--multirun|train -m |sweep=")  # each job of one is checked, which takes long


def _takes_long(page: Path, line: str) -> bool:
    return page.name != "README.md" or page.parent != ROOT or bool(SWEEPS.search(line))


@dataclass
class Place:
    """Where a command runs: a folder with the files that the pages speak of, and a server."""

    folder: Path
    server: StubServer

    def words(self, line: str) -> list[str]:
        return shlex.split(line.replace("http://localhost:8000/v1", self.server.url).replace("<run_id>", "run"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("pages")
    (reward,) = blocks(ROOT / "README.md", "python")
    (folder / "my_rewards.py").write_text(reward)
    rows = [{"prompt": f"a{i}", "answer": "b", "golden_response": ["b"]} for i in range(12)]
    (folder / "my.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "written").mkdir()
    for name in ("train_data.json", "eval_data.json"):
        (folder / "written" / name).write_text(json.dumps(rows))
    (folder / "topics.txt").write_text("cooking\ntravel\n")
    for name, text in zip(("experiment/mine.yaml", "mytrain.yaml"), blocks(ROOT / "README.md", "yaml"), strict=True):
        (folder / "conf-of-mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "conf-of-mine" / name).write_text(text)
    run = [
        "debug=fast",
        "eval=none",
        "logger=none",
        "hardware=cpu",
        "hydra.run.dir=outputs/run",
        "training.checkpoint_every=2",
    ]
    assert command(run, folder).code == 0
    model, tokenizer = load_model(name="embedded")
    with StubServer(name="glm-4.7") as server, pytest.MonkeyPatch.context() as patch:
        server.speak_for(model, tokenizer)
        server.write = _write
        patch.syspath_prepend(folder)
        yield Place(folder, server)


def _write(messages: list[dict[str, str]], sample: int) -> str:
    """Prompts that are not there yet where prompts are asked for, and otherwise a response."""
    text = messages[-1]["content"]
    topic = re.search(r"about this topic: (\w+)", text)
    known = max([0, *(int(number) for number in re.findall(r"request (\d+)", text))])
    lines = [f"{i}. request {known + i} about {topic[1]}" for i in range(1, 11)] if topic else ["a response"]
    return "\n".join(lines)


def _train(line: str, place: Place) -> None:
    # Another command writes the data; the jobs of one seed are those of the others.
    line = line.replace("data/generated/", "written/").replace("seed=1,2,3", "seed=1")
    words = place.words(line.replace("--config-dir experiments/", f"--config-dir {ROOT}/experiments/"))
    door = "selfdistill.train" if "python" in words else "train"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "installed", lambda package: True)  # a page may speak of vLLM's build for a CPU
        outcome = command([*words[words.index(door) + 1 :], "check=true"], place.folder)
    assert (outcome.code, outcome.left) == (0, set()), outcome.err


def _doctor(line: str, place: Place) -> None:
    outcome = command(place.words(line)[3:], place.folder, doctor)
    assert (outcome.err, outcome.left) == ("", set()), outcome.out
    # A GPU's profile, and a model of the hub, may be missing on the machine of the tests: nothing else.
    missing = {"GPU", "model"} if "hardware=gpu" in line else set()
    assert {row.split()[1] for row in outcome.out.splitlines() if row.startswith("error")} <= missing, outcome.out
    assert outcome.code == 0 or missing


def _export(line: str, place: Place) -> None:
    outcome = command(place.words(line)[3:], place.folder, export)
    assert outcome.code == 0, outcome.err
    assert '"verdict": "equal"' in outcome.out


def _compare(line: str, place: Place) -> None:
    """On a sweep that is made up; one of the pages' own takes minutes."""
    words = place.words(line)[3:]
    studies = [word for word in words if re.match(r"outputs/(paper|studies)/", word)]
    for sweep in ("outputs/multirun/SWEEP", "outputs/sdpo_grid", *studies):
        if not (place.folder / sweep).exists():
            write_sweep(place.folder / sweep, [{"alpha": 0}, {"alpha": 1}], (1, 2))
    if studies:  # their keys are others than those of the one that is made up; tests/test_studies.py has more
        words = [word for word in words if not word.startswith("baseline=")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "charts", lambda comparison: iter(()))  # pictures take seconds
        outcome = command(words, place.folder, compare)
    assert outcome.code == 0, outcome.err
    assert "Highest" in outcome.out


def _workspace(line: str, place: Place) -> None:
    """Without an account it writes what it would send."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # wandb-workspaces still uses pydantic's old names
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("NETRC", str(place.folder / "no-netrc"))
        outcome = command(place.words(line)[3:], place.folder, workspace)
    assert outcome.code == 0, outcome.err
    assert any(name.startswith("outputs/workspace-") for name in outcome.left)


def _generate(line: str, place: Place) -> None:
    outcome = command([*place.words(line)[3:], f"base_url={place.server.url}"], place.folder, generate_data)
    assert outcome.code == 0, outcome.err
    assert "data/generated/train_data.json" in outcome.left


def _script(line: str, place: Place) -> None:
    """The script is there, compiles, and its help knows the options; what it measures takes minutes."""
    words = [word for word in place.words(line) if not re.match(r"[A-Z_]+=", word)]
    script = ROOT / words[1]
    text = script.read_text()
    compile(text, str(script), "exec")
    options = [word for word in words if word.startswith("--")]
    if "argparse" not in text:
        assert not options
        return
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.syspath_prepend(script.parent)
        patch.setattr(sys, "argv", [str(script), *words[2:], "--help"])
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 0
    assert not [option for option in options if f'"{option}"' not in text]


def _tests(line: str, place: Place) -> None:
    """A file of tests, or a module beside them, is there; it is run as one of the tests or takes minutes."""
    name = line.split()[-1]
    assert (ROOT / name if "/" in name else ROOT / f"{name.replace('.', '/')}.py").exists()


def _make(line: str, place: Place) -> None:
    _, target, *study = line.split()
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
    for name in study:  # tests/test_studies.py checks its sweeps
        assert (ROOT / "experiments" / "studies" / name.removeprefix("NAME=") / "conf" / "sweep").is_dir()


def _pip(line: str, place: Place) -> None:
    if line == "pip install deepspeed":  # works beside what the project needs; no extra of its own
        return
    wanted = re.fullmatch(r"\.(?:\[(\w+)\])?", place.words(line)[2])
    assert wanted
    assert wanted[1] is None or wanted[1] in PROJECT["optional-dependencies"]


def _clone(line: str, place: Place) -> None:
    url = place.words(line)[2]
    assert PROJECT["urls"]["Documentation"].startswith(url)
    assert line.endswith(f"cd {url.rsplit('/', 1)[1]}")


def _vllm(line: str, place: Place) -> None:
    """Its options are those that the tests start a real server with, or that TRL starts one for a trainer with."""
    from trl.scripts.vllm_serve import ScriptArguments, build_command

    started = (ROOT / "tests" / "vllm" / "conftest.py").read_text()
    of_trl = build_command(ScriptArguments(model="student"))
    given = place.words(line)
    assert not [w for w in given if w.startswith("--") and f'"{w}"' not in started and w not in of_trl]
    if "VLLM_SERVER_DEV_MODE=1" in given:
        needed = of_trl[of_trl.index("--weight-transfer-config") :]
        assert given[-len(needed) :] == needed


def _launch(line: str, place: Place) -> None:
    """The launcher knows its options, and the run passes its checks; test_processes and test_sharding start some."""
    words = [word for word in place.words(line) if not re.match(r"[A-Z_]+=\d+$", word)]
    at = words.index("-m")
    assert words[at : at + 2] == ["-m", "selfdistill.train"]
    if words[0] == "torchrun":
        from torch.distributed.run import parse_args

        assert parse_args(words[1:]).training_script == "selfdistill.train"
    else:
        from accelerate.commands.launch import _validate_launch_command, launch_command_parser

        files = [str(ROOT / word) if word.endswith(".yaml") else word for word in words[2:]]
        args, _, _ = _validate_launch_command(launch_command_parser().parse_args(files))
        assert args.training_script == "selfdistill.train"
    if words[at + 2 :] != ["…"]:
        outcome = command([*words[at + 2 :], "check=true"], place.folder)
        assert outcome.code == 0, outcome.err


def _docker(line: str, place: Place) -> None:
    """The image's arguments and folders are the Dockerfile's; building it takes a network and minutes."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert all(f"ARG {name}=" in dockerfile for name in re.findall(r"--build-arg (\w+)=", line))
    assert all(f"WORKDIR {folder}" in dockerfile for folder in re.findall(r"\$PWD\"?:(\S+)", line))
    assert line.split()[1] in ("build", "run")


def _download(line: str, place: Place) -> None:
    """What is fetched is what a file of conf/model trains."""
    from huggingface_hub.cli.hf import app

    assert app is not None
    assert any(f"name: {line.split()[-1]}\n" in file.read_text() for file in (ROOT / "conf" / "model").glob("*.yaml"))


def _as_it_stands(line: str, place: Place) -> None:
    """A program of the system or of Python, without anything of ours."""


def _python(line: str, place: Place) -> None:
    exec(compile(place.words(line)[2], line, "exec"), {})


def _completion(line: str, place: Place) -> None:
    called = re.fullmatch(r'eval "\$\((\S+) (.*)\)"', line)
    assert called and called[1] in PROJECT["scripts"]
    outcome = command(called[2].split(), place.folder)
    assert (outcome.code, outcome.err) == (0, "")
    assert "complete -o nospace" in outcome.out


RULES: list[tuple[str, Callable[[str, Place], None]]] = [
    (r"python -m selfdistill\.train( |$)", _train),
    (r"selfdistill train( |$)", _train),
    (r"python -m selfdistill\.doctor( |$)", _doctor),
    (r"python -m selfdistill\.export( |$)", _export),
    (r"python -m selfdistill\.workspace( |$)", _workspace),
    (r"python -m selfdistill\.generate_data( |$)", _generate),
    (r"python -m selfdistill\.compare( |$)", _compare),
    (r"([A-Z_]+=\S+ )*python \S+\.py( |$)", _script),
    (r"make [\w-]+( NAME=\w+)?$", _make),
    (r"pip install \S+$", _pip),
    (r"git clone \S+ && cd \S+$", _clone),
    (r"(VLLM_SERVER_DEV_MODE=1 )?vllm serve |.*-m vllm\.entrypoints", _vllm),
    (r"([A-Z_]+=\S+ )*(accelerate launch|torchrun) ", _launch),
    (r"python -c ", _python),
    (r"python -m (pytest )?tests\b", _tests),
    (r'eval "\$\(selfdistill ', _completion),
    (r"docker (build|run) ", _docker),
    (r"hf download \S+$", _download),
    (r"hf auth login$", _as_it_stands),
    (r"nvidia-smi$|python -m venv \S+$|source \S+$", _as_it_stands),
]


def test_commands_are_found() -> None:
    pages = ("README.md", "CLUSTER.md", "ARCHITECTURES.md", "GPU_24GB.md")
    found = [line for page, line in COMMANDS if page.name in pages]
    for _, rule in RULES:
        assert any(_rule(line) is rule for line in found), f"no command for {rule.__name__}: it is not needed any more"


@pytest.mark.parametrize(
    ("page", "line"),
    [pytest.param(*case, marks=[pytest.mark.long] if _takes_long(*case) else []) for case in COMMANDS],
    ids=[f"{page.relative_to(ROOT)}-{line}"[:80] for page, line in COMMANDS],
)
def test_a_command_of_the_pages_runs(page: Path, line: str, place: Place) -> None:
    rule = _rule(line)
    assert rule is not None, f"{page}: no rule covers `{line}`; say in RULES how it is tried"
    rule(line, place)


def _rule(line: str) -> Callable[[str, Place], None] | None:
    return next((rule for pattern, rule in RULES if re.match(pattern, line)), None)


PYTHON = [(page, block) for page in PAGES for block in blocks(page, "python")]


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[f"{page.name}-{block[:30]}" for page, block in PYTHON])
def test_python_blocks_name_what_exists(page: Path, block: str) -> None:
    """Imported names are there, and calls of them take the arguments that the page gives them."""
    known: dict[str, Any] = {}
    called = 0
    for other in blocks(page, "python"):
        for node in ast.walk(_parsed(other)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                known |= {alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(_parsed(block)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            keywords = {word.arg: None for word in node.keywords if word.arg}
            inspect.signature(known[node.func.id]).bind_partial(*node.args, **keywords)
            called += 1
    assert called or not known


def _parsed(block: str) -> ast.Module:
    """`…, ...)` stands for what is left out."""
    return ast.parse(block.replace(", ...)", ")"))


def test_the_first_block_of_the_python_page_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    block = blocks(ROOT / "docs" / "python.md", "python")[0].replace(
        "Qwen/Qwen2.5-0.5B-Instruct", str(resolve("embedded"))
    )
    small = "max_completion_length=8, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, learning_rate"
    rows = [{"prompt": [{"role": "user", "content": "shout hi"}], "answer": "HI"}]
    exec(compile(block.replace("learning_rate", small), "python.md", "exec"), {"dataset": Dataset.from_list(rows)})
    assert (tmp_path / "output" / "checkpoint-3").is_dir()
