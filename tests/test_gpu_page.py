"""The GPU page's scripts run on a CPU in a tiny size; the Dockerfile and the guide for a 24 GB card say what is so."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from experiments.gpu import run, table
from experiments.gpu.cases import CASES, LOSSES
from selfdistill.machine.memory_estimate import estimate
from tests.command import composed

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
GUIDE = (ROOT / "docs" / "GPU_24GB.md").read_text()


# ---- the Dockerfile ----


def required(extra: str = "") -> dict[str, Requirement]:
    """What pyproject asks for, by package."""
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return {found.name: found for found in map(Requirement, lines)}


def argument(name: str) -> str:
    """The default of an ARG."""
    (value,) = re.findall(rf"^ARG {name}=(\S+)$", DOCKERFILE, re.M)
    return value


def test_the_dockerfile_pins_what_pyproject_asks_for() -> None:
    pins = dict(re.findall(r"^    \"?([\w-]+)==([\w.${}]+)\"? \\$", DOCKERFILE, re.M))
    pins["trl"] = argument("TRL_VERSION")
    asked = required("quantization") | required()
    assert {"torch", "transformers", "trl", "peft"} <= pins.keys() <= asked.keys()
    assert [name for name, version in pins.items() if not asked[name].specifier.contains(version)] == []
    assert f"torch=={pins['torch']}" in (ROOT / "Makefile").read_text()
    assert "python 3.11" in DOCKERFILE
    assert required("vllm")["vllm"].specifier.contains("0.31.0")  # the extra pins it, and nothing else does
    assert not re.search(r"(vllm|unsloth)==", DOCKERFILE)


def test_the_dockerfiles_unsloth_has_the_trl_that_it_works_with() -> None:
    (line,) = re.findall(r"^#.*(docker build .*unsloth.*)$", DOCKERFILE, re.M)
    (trl,) = re.findall(r"TRL_VERSION=(\S+)", line)
    assert required("unsloth")["trl"].specifier.contains(trl)
    assert not required("unsloth")["trl"].specifier.contains(argument("TRL_VERSION"))
    for extras in (argument("EXTRAS"), re.findall(r"EXTRAS=(\S+)", line)[0]):
        assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    assert "unsloth" in extras.split(",")


@pytest.mark.skipif(shutil.which("hadolint", path=str(Path(sys.executable).parent)) is None, reason="no hadolint here")
def test_the_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


# ---- the guide ----


def test_the_guides_memory_is_that_of_its_command() -> None:
    (command,) = re.findall(r"^python -m selfdistill\.train (.*) --check$", GUIDE, re.M)
    weights, vllm, most = (
        float(re.findall(rf"^\| \**{part}.*?\| \**([\d.]+)\** \|$", GUIDE, re.M)[0])
        for part in ("weights in 16 bits", "vLLM, while", "the most at any time\\*\\*")
    )
    cfg = composed(command.split())
    assert weights == pytest.approx(estimate(cfg)["weights"], abs=0.06)
    assert vllm == pytest.approx(cfg.hardware.memory_gib * cfg.hardware.vllm.gpu_memory_utilization)
    assert weights + vllm < most < cfg.hardware.memory_gib


# ---- the table ----


def record(name: str, seconds: float = 1.0, **more: Any) -> dict[str, Any]:
    step = {"update": {"seconds": seconds, "peak_gib": 2 * seconds, "used_gib": 0.0}}
    return {"case": name, "steps": [{"update": {"seconds": 99.0, "peak_gib": 0.1, "used_gib": 0.0}}, step, step]} | more


def test_the_table_leaves_out_the_warm_up_and_compares_with_trl() -> None:
    ours, trl = (f"sdpo-0.5b-transformers-{side}" for side in ("ours", "trl"))
    rows = table.table([record(trl, 4.0), record(ours, 1.0)]).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    heads = [*table.HEADS]
    assert [row[heads.index("trainer")] for row in cells] == ["ours", "trl"]
    assert [row[heads.index("step s")] for row in cells] == ["1.00", "4.00"]
    assert cells[0][heads.index("ours / TRL")] == "0.25 time, 0.25 memory"


def test_a_failed_case_stands_in_the_table_with_its_error() -> None:
    name = "sdpo-7b-transformers-trl"
    rows = table.table([{"case": name, "error": "CUDA | out of memory"}]).splitlines()[2:]
    assert len(rows) == 1 and "failed: CUDA \\| out of memory" in rows[0]


def test_the_page_is_written_from_the_records() -> None:
    files = [table.read(run.RESULTS[tiny]) for tiny in (False, True)]
    assert (run.HERE / "RESULTS.md").read_text() == table.page(*files), "python experiments/gpu/run.py --write"
    assert ("Not yet run on a GPU" in table.page(*files)) == (not files[0])


def test_published_numbers_stand_beside_ours() -> None:
    name = "opd-0.6b-transformers-ours"
    more = {"end_to_end_s": 200.0, "completions_per_step": 640, "completion_tokens": 128, "mean_completion_tokens": 100}
    rows = table.opd_table({name: record(name, **more)})
    assert "| ours, transformers | 1 | 200 | 9.60 | 960.0 | 1.00 |" in rows
    assert "| verl (published) | 2 × H100 80 GB | 229 |" in rows


# ---- the command, with a stand-in for the processes that measure ----

STAND_IN = """#!{python}
import json, sys, time
case = sys.argv[3]
if "--prepare" in sys.argv:
    sys.exit()
if case.startswith("gkd"):
    sys.exit("RuntimeError: CUDA out of memory\\nWARNING: process group not destroyed")
if case.startswith("hybrid"):
    time.sleep(60)
with open(sys.argv[sys.argv.index("--out") + 1], "w") as out:
    step = {{"update": {{"seconds": 1.0, "peak_gib": 1.0, "used_gib": 0.0}}}}
    json.dump({{"case": case, "steps": [step]}}, out)
"""


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command with the stand-in; gives the records and what it printed."""
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    results = tmp_path / "results.jsonl"

    def call(*arguments: str) -> tuple[list[dict[str, Any]], str]:
        common = ["--tiny", "--results", str(results), "--work", str(tmp_path / "work"), "--python", str(python)]
        run.main([*common, *arguments])
        return [json.loads(line) for line in results.read_text().splitlines()], capsys.readouterr().out

    return call


def test_a_failing_case_leaves_its_error_and_the_others_go_on(call: Any) -> None:
    records, printed = call("--only", "gkd-0.5b-transformers", "--only", "sdpo-0.5b-transformers")
    assert len(records) == 4
    assert [found["error"] for found in records if found["case"].startswith("gkd")] == [
        "RuntimeError: CUDA out of memory"
    ] * 2
    assert not any("error" in found for found in records if found["case"].startswith("sdpo"))
    assert "failed: RuntimeError: CUDA out of memory" in printed


def test_a_case_that_takes_too_long_is_ended(call: Any) -> None:
    records, _ = call("--only", "hybrid-0.5b-transformers-ours", "--limit-s", "0.5")
    assert records[0]["error"] == "not done within its limit of 0.5 s"


def test_the_next_call_goes_on_where_the_last_one_stopped(call: Any) -> None:
    records, printed = call("--only", "sdft-0.5b-transformers", "--budget-s", "0")
    assert len(records) == 1 and "1 cases are left" in printed
    records, printed = call("--only", "sdft-0.5b-transformers", "--budget-s", "0")
    assert [found["case"] for found in records] == [f"sdft-0.5b-transformers-{side}" for side in ("ours", "trl")]
    assert "left" not in printed
    records, _ = call("--only", "sdft-0.5b-transformers")
    assert len(records) == 2
    records, _ = call("--only", "sdft-0.5b-transformers-ours", "--again")
    assert len(records) == 3


def test_a_case_that_there_is_not_is_refused(call: Any) -> None:
    with pytest.raises(SystemExit, match="no case is called so"):
        call("--only", "ppo")


# ---- time and memory by phase ----


def test_every_second_counts_for_the_innermost_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.gpu import meter as meters

    class Clock:
        now, peak = 0.0, 0.0
        on_gpu = False

        def wait(self) -> None: ...

        def reset_peak(self) -> None:
            self.peak = 0.0

        def peak_gib(self) -> float:
            return self.peak

        def take_gib(self) -> float:
            return 0.0

        def work(self, seconds: float, gib: float) -> None:
            self.now, self.peak = self.now + seconds, max(self.peak, gib)

    clock: Any = Clock()

    class Trainer:
        def _calculate_rewards(self) -> None:
            clock.work(2, 5)
            self._ask_teacher()
            clock.work(1, 1)

        def _ask_teacher(self) -> None:
            clock.work(10, 7)

    monkeypatch.setattr(meters.time, "perf_counter", lambda: clock.now)
    trainer = Trainer()
    meter = meters.Meter(clock, clock).watch(trainer)
    trainer._ask_teacher()  # before the first step: counts for nothing
    meter.begin()
    clock.work(4, 3)
    trainer._calculate_rewards()
    clock.work(5, 2)
    meter.end()
    (step,) = meter.steps
    assert {name: (phase.seconds, phase.peak_gib) for name, phase in step.items()} == {
        "update": (9, 3),
        "reward": (3, 5),
        "teacher": (10, 7),
    }


def test_what_is_measured_is_there() -> None:
    import trl
    from trl.experimental.sdft import SDFTTrainer
    from trl.experimental.sdpo import SDPOTrainer

    from experiments.gpu.meter import METHODS, METHODS_WITHOUT_GRADIENT
    from selfdistill.training.trainer import SelfDistillTrainer

    trainers = (SelfDistillTrainer, trl.GRPOTrainer, trl.DistillationTrainer, SDFTTrainer, SDPOTrainer)
    for name in (*METHODS, *METHODS_WITHOUT_GRADIENT):
        assert any(hasattr(trainer, name) for trainer in trainers), name
    for trainer in trainers:
        assert {"generate", "teacher"} <= {
            phase for name, phase in (METHODS | METHODS_WITHOUT_GRADIENT).items() if hasattr(trainer, name)
        }


def test_the_tokenizer_has_a_text_for_every_token() -> None:
    from experiments.gpu.models import SPECIAL, tokenizer_of

    tokenizer = tokenizer_of(2048)
    assert len(tokenizer) == 2048
    assert sorted(tokenizer.all_special_tokens) == sorted({tokenizer.pad_token, tokenizer.eos_token} & set(SPECIAL))
    text = "some words, and Ünicode too"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert all(tokenizer.decode([token]) for token in range(300, 2048))
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False).endswith("assistant\n")


# ---- every script, in a tiny size ----

ON_THE_CPU = [case for case in CASES.values() if case.sampler != "vllm" and case.shape != "7b"]
ON_THE_CPU += [CASES["sdpo-7b-transformers-ours"], CASES["gkd-7b-transformers-trl"]]
EXPECTED = {
    "sft": set(),
    "grpo_supervised": {"generate", "reward", "teacher"},
    "sdft": {"generate", "teacher"},
    "sdpo": {"generate", "reward", "teacher"},
    "sdpo_feedback": {"generate", "reward", "teacher"},
    "hybrid": {"generate", "reward", "teacher"},
    "gkd": {"generate", "teacher"},
    "opd": {"generate", "teacher"},
} | dict.fromkeys(LOSSES, set())


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_every_case_runs_in_a_tiny_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    results = tmp_path / "results.jsonl"
    only = [word for case in ON_THE_CPU for word in ("--only", case.name)]
    common = ["--tiny", "--one-process", "--budget-s", "900"]
    run.main([*common, *only, "--results", str(results), "--work", str(tmp_path)])
    records = table.read(results)
    assert [(name, found["error"]) for name, found in records.items() if "error" in found] == []
    assert len(records) == len(ON_THE_CPU)
    for case in ON_THE_CPU:
        found = records[case.name]
        assert len(found["steps"]) == 2 and found["end_to_end_s"] > found["first_step_s"] > 0
        for step in found["steps"]:
            assert {name for name, phase in step.items() if phase["seconds"] > 0} >= {"update"} | EXPECTED[case.work]
        if case.side == "ours" and case.work in (*LOSSES, "sdft", "grpo_supervised") and case.shape == "0.5b":
            # The same model, rows, completions and settings: the first losses are the same.
            peer = records[case.name.replace("-ours", "-trl")]
            assert found["losses"][0] == pytest.approx(peer["losses"][0], rel=1e-3, abs=1e-7)


@pytest.mark.long
def test_the_command_measures_in_a_process_of_its_own(tmp_path: Path) -> None:
    name, results = "loss_forward-0.5b-none-ours", tmp_path / "results.jsonl"
    run.main(["--tiny", "--only", name, "--results", str(results), "--work", str(tmp_path)])
    (found,) = table.read(results).values()
    assert found["case"] == name and "error" not in found, found
