"""Wrong commands and files: each is refused with one message that names the key or file, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.command import command, composed, sampled

GPU = pytest.mark.skipif(
    "CUDA_VISIBLE_DEVICES" not in os.environ and Path("/dev/nvidia0").exists(), reason="there is a GPU"
)
TAUGHT = "reward=none teacher=demonstration"
DEMONSTRATED = "reward=none rollout.on_policy_fraction=0 rollout.cross_entropy_weight=1"

# What is written (split at spaces), and what the message must say.
COMPOSITION = [
    # typing errors in keys, with and without the plus sign, at every depth
    ("betta=1", ["betta is not a key", "did you mean beta?"]),
    ("+betta=1", ["betta is not a key", "did you mean beta?"]),
    ("++betta=1", ["betta is not a key", "did you mean beta?"]),
    ("training.arguments.learning_rate=3", ["training.arguments.learning_rate", "write learning_rate=…"]),
    ("+training.arguments.learning_rate=3", ["training.arguments.learning_rate", "write learning_rate=…"]),
    ("training.arguments.optim=sgd", ["training.arguments.optim", "plus sign, +training.arguments.optim=…"]),
    ("eval.scorer.contains=true", ["eval.scorer.contains is not a key", "reward@eval.scorer=exact_match"]),
    ("max_steps=null", ["max_steps=null", "epochs=3"]),
    ("epochs=3 max_steps=5", ["max_steps is set but nothing reads it", "epochs=null"]),
    ("keep_best=eval/accuracy", ["keep_best=eval/accuracy", "eval.every=20"]),
    ("experiment=gkd model=local model.name=mine", ["teacher.weights.name is missing", "mine"]),
    ("distillation.tpo_k=3", ["distillation.tpo_k is not a key", "did you mean top_k?"]),
    ("+distillation.tpo_k=3", ["distillation.tpo_k is not a key", "did you mean top_k?"]),
    ("hardware.vllm.mod=colocate", ["hardware.vllm.mod is not a key", "did you mean mode?"]),
    ("+model.lora.ranks=3", ["model.lora.ranks is not a key", "known here: alpha, dropout, r, target_modules"]),
    ("data.pth=my.jsonl", ["data.pth is not a key", "did you mean path?"]),
    ("monitors.entropy.actoin=stop", ["monitors.entropy.actoin is not a key", "did you mean action?"]),
    ("eval=none eval.max_rows=3", ["eval.max_rows is not a key", "eval has no keys here"]),
    ("rollout.temperature.x=3", ["rollout.temperature.x is not a key", "rollout.temperature has no keys here"]),
    ("+experiment.seed=1", ["experiment is not a key"]),
    ("+beta=1", ["+beta: the key is there already", "beta=VALUE"]),
    ("~beta", ["beta was removed"]),
    ("~model.name", ["model.name was removed"]),
    ("~gamma", ["~gamma: there is no such key"]),
    # groups and their choices
    ("modle=tiny", ["modle is not a key", "did you mean model?"]),
    ("model=tini", ["model=tini: there is no such choice", "did you mean tiny?"]),
    ("reward=superviced", ["reward=superviced: there is no such choice", "did you mean supervised?"]),
    ("experiment=sdpoo", ["experiment=sdpoo: there is no such choice", "did you mean sdpo?"]),
    (
        "teacher=demonstration teacher/weights=emma",
        ["teacher/weights=emma: there is no such choice", "did you mean ema?"],
    ),
    ("teacher/weights=ema", ["teacher/weights", "Choose that first"]),
    ("+experiment=sdft", ["+experiment=sdft", "write experiment=sdft"]),
    ("reward=null", ["reward=null", "write reward=none"]),
    ("model=null", ["model=null", "write the name of an option", "local"]),
    # types, ranges and choices
    ("beta=abc", ["beta='abc': write a number"]),
    ("beta=nan", ["beta=nan: write a finite number"]),
    ("beta=inf", ["beta=inf: write a finite number"]),
    ("max_steps=1.5", ["max_steps=1.5: write a whole number"]),
    ("max_steps=true", ["max_steps=True: write a whole number"]),
    ("dry_run=perhaps", ["dry_run='perhaps': write true or false"]),
    ("tags=a", ["tags='a': write a list"]),
    ("output_dir=[a]", ["output_dir=['a']: write text"]),
    ("rollout=5", ["rollout is a group of keys", "rollout.on_policy_fraction=…"]),
    (
        "reward=exact_match reward.feedback=${missing}",
        ["reward.feedback refers to a key that does not exist", "missing"],
    ),
    ("model.lora=null", ["model.lora is a group of keys", "model.lora.r=…"]),
    ("training.arguments=5", ["training.arguments=5: write keys and values"]),
    ("beta=-1", ["beta=-1 is out of range", "at least 0"]),
    ("alpha=2", ["alpha=2 is out of range", "at least 0 and at most 1"]),
    ("learning_rate=0", ["learning_rate=0 is out of range", "above 0"]),
    ("rollout.top_p=0", ["rollout.top_p=0 is out of range", "above 0 and at most 1"]),
    ("teacher=demonstration distillation.signal=tokens", ["distillation.signal=tokens", "sampled_token"]),
    ("training.loss_type=gpro", ["training.loss_type=gpro", "grpo"]),
    # another kind of value where a path, a list or a mapping is read
    ("resume=true", ["resume=True: write text", "or null"]),
    ("+resume=true", ["resume=True: write text"]),
    ("repeat=3", ["repeat=3: write text"]),
    ("training.arguments=${seed}", ["training.arguments=0: write keys and values"]),
    ("tags=${seed}", ["tags=0: write a list of texts"]),
    ("tasks=${seed}", ["tasks=0: write keys and values"]),
    ("data.eval_path=3", ["data.eval_path=3: write text"]),
    ("data=jsonl data.path=3", ["data.path=3: write text"]),
    ("--multirun data.eval_path=str(3),int(3)", ["data.eval_path=3: write text"]),
    # what cannot be read, and what is missing
    ("data.path=[1,", ["data.path=[1, cannot be read"]),
    ('data.path="my', ['data.path="my cannot be read']),
    ("beta=0,0.04", ["beta=0,0.04", "--multirun"]),
    ("learning_rate=${model.rate}", ["learning_rate refers to a key that does not exist", "model.rate"]),
    ("logger.project=${oc.env:NO_SUCH_VARIABLE}", ["logger.project", "NO_SUCH_VARIABLE"]),
    ("model=local", ["model.name is missing"]),
    ("data=jsonl", ["data.path is missing"]),
    ("teacher=model", ["teacher.weights.name is missing"]),
    ("reward=function", ["reward._target_ is missing"]),
    ("--config-name nothing", ["Cannot find primary config 'nothing'"]),
    ("--config-dir nowhere", ["nowhere", "not found"]),
    ("--config-dir mine model=broken", ["broken.yaml, line"]),
    ("--chekc", ["--chekc is not a flag", "did you mean --check?"]),
    ("--cfg jobs", ["--cfg", "jobs"]),
    ("--experimental-rerun x", ["--experimental-rerun", "resume="]),
    # what may not be built
    ("reward._target_=os.system", ["reward._target_=os.system", "trusted_prefixes=[os]"]),
    ("reward._target_=torchvision.ops.nms", ["reward._target_=torchvision.ops.nms", "trusted_prefixes=[torchvision]"]),
    ("reward._target_=torch.load", ["reward._target_=torch.load: only selfdistill, trl.rewards are trusted"]),
    ("reward._target_=transformers.pipeline", ["only selfdistill, trl.rewards are trusted"]),
    ("reward._target_=my_reward", ["reward._target_='my_reward': write a dotted path"]),
    ("~reward._target_", ["reward has no _target_"]),
    ("+hydra.callbacks.x._target_=os.getpid", ["only selfdistill's own callbacks are run"]),
    ("+hydra.callbacks.x._target_=selfdistill.files.write_atomically --check", ["only selfdistill's own callbacks"]),
    ("hydra.launcher._target_=os.getpid", ["only Hydra's launchers and sweepers can stand here"]),
    # Hydra's keys that would have no effect
    ("hydra.job.name=x", ["hydra.job.name has no effect", "name=NAME"]),
    ("hydra.verbose=true", ["hydra.verbose has no effect"]),
    ("hydra.output_subdir=x --check", ["hydra.output_subdir has no effect", "hydra.run.dir=FOLDER"]),
    ("hydra/job_logging=default --check", ["hydra.job_logging has no effect"]),
    ("hydra.searchpath=[file:///nowhere/at/all]", ["hydra.searchpath: there is no folder /nowhere/at/all"]),
    ("--config-path x", ["--config-dir=x"]),
    # groups are given the names of options
    ("experiment=5", ["experiment=5: write the name of an option"]),
    ("logger=true", ["logger=true: write the name of an option", "wandb"]),
    ("hardware=[[1]]", ["hardware=[[1]]: write the name of an option"]),
    ("~experiment=2", ["experiment=2: write the name of an option"]),
    ("=5", ["=5 has no key"]),
    ("-sc", ["--shell-completion: write eval"]),
    ("-sc install=nothing", ["--shell-completion: write eval"]),
    ("hardware.memory_gib=" + "9" * 400, ["hardware.memory_gib=999", "characters left out", "too large"]),
    ("model=" + "x" * 100_000, ["model=xxx", "characters left out", "write the name of an option"]),
    ("beta=" + "x" * 100_000, ["beta='xxx", "characters left out", "write a number"]),
    ("hardware.threads=10000", ["hardware.threads=10000 is out of range"]),
    ("model.tuning=lora model.lora.r=100000", ["model.lora.r=100000 is out of range"]),
    ("model.tuning=lora model.lora.target_modules=5", ["model.lora.target_modules=5: write all-linear"]),
    # files and folders that are not there
    ("data=jsonl data.path=absent.jsonl --check", ["data.path=absent.jsonl: there is no such file"]),
    ("--multirun seed=0,1 data=jsonl data.path=absent.jsonl", ["data.path=absent.jsonl: there is no such file"]),
    ("data.eval_path=absent.jsonl", ["data.eval_path=absent.jsonl: there is no such file"]),
    ("data=jsonl data.path=mine", ["data.path=mine is a folder"]),
    ("model=local model.name=mine --check", ["model.name=mine: this folder holds no model", "no config.json"]),
    ("model=local model.name=./absent --check", ["model.name=./absent: there is no such folder"]),
    ("model=local model.name=mine/absent", ["model.name=mine/absent: there is no such folder."]),
    ("resume=nowhere", ["nowhere is no run's folder"]),
    ("resume=nowhere hydra.run.dir=x", ["hydra.run.dir=x cannot be given with resume=nowhere"]),
    ("repeat=nowhere", ["nowhere is no run's folder"]),
    # combinations
    ("reward=none", ["Nothing to learn from", "reward=supervised", "teacher=demonstration"]),
    ("reward=none rollout.cross_entropy_weight=1", ["rollout.cross_entropy_weight", "rollout.on_policy_fraction=0"]),
    (f"{TAUGHT} distillation.weight=0", ["distillation.weight=0 leaves nothing to learn"]),
    ("alpha=0.5", ["alpha is set but nothing reads it", "there is no teacher"]),
    ("distillation.top_k=5", ["distillation.top_k is set but nothing reads it", "there is no teacher"]),
    ("policy_weight=0.5", ["policy_weight is set but nothing reads it"]),
    (f"{TAUGHT} policy_weight=0.5", ["policy_weight is set but nothing reads it", "there is no reward"]),
    (f"{TAUGHT} distillation.signal=advantage alpha=0.5", ["alpha is set but nothing reads it", "signal=advantage"]),
    (f"{TAUGHT} distillation.signal=advantage distillation.is_clip=3", ["distillation.is_clip", "signal=advantage"]),
    (
        f"{TAUGHT} distillation.signal=advantage distillation.aggregation=token_mean",
        ["distillation.aggregation is set"],
    ),
    (f"{TAUGHT} distillation.signal=advantage distillation.temperature=2", ["distillation.temperature is set"]),
    (
        f"{TAUGHT} distillation.signal=advantage distillation.count_inactive_rows=false",
        ["distillation.count_inactive_rows is set"],
    ),
    (f"{TAUGHT} distillation.tail=false", ["distillation.tail is set but nothing reads it", "distillation.top_k"]),
    ("model.lora.r=8", ["model.lora.r is set but nothing reads it", "model.tuning=lora"]),
    ("hardware.vllm.standby=true", ["hardware.vllm.standby is set but nothing reads it", "hardware.vllm.mode is null"]),
    (
        "num_generations=7",
        ["num_generations=7 does not divide a batch of 32", "num_generations=8", "completions_per_step=28"],
    ),
    (
        "hardware.accumulation_steps=8 hardware.per_device_batch_size=1 num_generations=3",
        ["num_generations=3 does not divide a batch of 8", "num_generations=2", "accumulation_steps=3"],
    ),
    (
        "hardware.per_device_batch_size=5",
        ["completions_per_step=32 cannot be divided into passes of 5", "write completions_per_step=40"],
    ),
    (
        "completions_per_step=8 hardware.accumulation_steps=1",
        ["completions_per_step is set but nothing reads it", "hardware.accumulation_steps=null"],
    ),
    ("num_generations=1", ["num_generations=1", "at least 2"]),
    ("rollout.max_completion_tokens=9999", ["rollout.max_completion_tokens=9999 is above model.max_seq_tokens=512"]),
    (f"{TAUGHT} distillation.signal=sampled_token", ["distillation.signal=sampled_token", "write alpha=1"]),
    (f"{TAUGHT} distillation.top_k=1 distillation.tail=false", ["distillation.top_k=1", "tail=true"]),
    (f"{TAUGHT} distillation.route=failures", ["distillation.route=failures needs a reward"]),
    ("rollout.from_teacher=true", ["rollout.from_teacher=true needs a teacher"]),
    ("reward=none teacher=feedback", ["teacher", "reward=exact_match"]),
    ("model.load_in_4bit=true", ["model.load_in_4bit=true", "model.tuning=lora"]),
    ("export=lora", ["export=lora", "export=merged_16bit"]),
    ("hardware=cpu hardware.vllm.mode=server", ["hardware.vllm.mode=server needs a GPU"]),
    ("hardware=cpu model.loader=unsloth", ["model.loader=unsloth needs a GPU"]),
    ("hardware=gpu_80gb hardware.vllm.mode=server", ["hardware.vllm.server_base_url"]),
    (f"{TAUGHT} hardware=gpu_24gb rollout.from_teacher=true", ["rollout.from_teacher=true", "hardware.vllm.mode=null"]),
    # sweeps: all jobs are checked before the first starts
    ("--multirun beta=0,-1", ["beta=-1 is out of range"]),
    ("--multirun betta=0,1", ["betta is not a key"]),
    ("--multirun reward=inverse_loss,superviced", ["reward=superviced: there is no such choice"]),
    ("--multirun num_generations=4,7", ["num_generations=7 does not divide"]),
    ("--multirun alpha=0,1", ["alpha is set but nothing reads it"]),
    ("--multirun beta=choice(0,", ["beta=choice(0, cannot be read"]),
]
# These need torch: signatures, data, weights.
LOADING = [
    ("reward=inverse_loss reward.score_eos=maybe", ["reward.score_eos='maybe': write true or false"]),
    ("eval.max_rows=many", ["eval.max_rows='many': write a whole number"]),
    ("data.eval_fraction=abc", ["data.eval_fraction='abc': write a number"]),
    (
        "reward._target_=selfdistill.rewards.ExactMach",
        ["selfdistill.rewards has no ExactMach", "did you mean ExactMatch?"],
    ),
    ("reward._target_=selfdistill.rewordz.InverseLoss", ["selfdistill has no rewordz", "did you mean rewards?"]),
    ("reward._target_=selfdistill.rewards", ["reward._target_=selfdistill.rewards is no class or function"]),
    ("reward._target_=selfdistill.runs.folder.shutil.rmtree", ["is shutil.rmtree, and not at home in selfdistill"]),
    ("trusted_prefixes=[json] reward._target_=json.codecs.open", ["is codecs.open, and not at home in json"]),
    ("trusted_prefixes=[absent] reward._target_=absent.f", ["reward._target_=absent.f", "there is no module absent"]),
    ("+reward.weight=3", ["reward.weight: selfdistill.rewards.ExactMatch takes no such argument", "contains"]),
    ("+data.colour=red", ["data.colour: selfdistill.data.load_data takes no such argument"]),
    ("+training.arguments.lernin_rate=1", ["training.arguments.lernin_rate", "did you mean learning_rate?"]),
    ("--multirun reward.contains=true,5", ["reward.contains=5: write true or false"]),
    ("resume=nowhere", ["nowhere is no run's folder"]),
    ("resume=mine", ["mine is no run's folder: config.yaml and summary.json are missing"]),
    ("logger.mode=loud", ["logger.mode is 'loud'", "offline"]),
    (
        "reward=python_tests allow_code_execution=true",
        ["reward.tests_field=tests: the rows of embedded:half_known_train"],
    ),
    ("reward=multiple_choice", ["reward: embedded:half_known_train, row "]),
    ("model.tuning=lora model.lora.target_modules=[nope]", ["model.lora.target_modules: the model has no layer nope"]),
    ("data=jsonl data.path=empty.jsonl --check", ["empty.jsonl is empty"]),
    ("data=jsonl data.path=malformed.jsonl --check", ["malformed.jsonl, line 2: malformed JSON"]),
    ("data=jsonl data.path=anwser.jsonl reward=exact_match --check", ["no row of anwser.jsonl has an answer"]),
    ("monitors.entropy.action=shout --check", ["monitors.entropy.action is 'shout'"]),
    ("monitors.entropy.action=shout", ["monitors.entropy.action is 'shout'", "warn, stop, off"]),
    ("eval.max_rows=0", ["eval.max_rows=0", "at least 1"]),
    ("export=merged_16bit export.dtype=float8", ["export.dtype=float8", "bfloat16"]),
    ("reward=python_tests", ["allow_code_execution=true"]),
    (f"{TAUGHT} teacher/weights=ema teacher.weights.rate=2", ["teacher.weights.rate=2.0 is outside (0, 1]"]),
    (f"{TAUGHT} teacher.context.template='nothing'", ["teacher.context.template", "{prompt}, {demonstration}"]),
    (f"{TAUGHT} teacher.context.template=file:absent.txt", ["teacher.context.template", "absent.txt"]),
    (f"{TAUGHT} distillation.top_k=5000", ["distillation.top_k=5000 is above the vocabulary of 102 tokens"]),
    pytest.param("hardware=gpu_16gb", ["hardware.device=cuda", "hardware=cpu"], marks=GPU),
    ("model=local model.name=absent/model model.local_files_only=true", ["model.name=absent/model cannot be loaded"]),
    ("model=local model.name=mine", ["model.name=mine: this folder holds no model", "no config.json"]),
    (
        "reward=none teacher=model teacher.weights.name=absent/model model.local_files_only=true",
        ["teacher.weights.name=absent/model cannot be loaded"],
    ),
    ("data=jsonl data.path=absent.jsonl", ["data.path=absent.jsonl: there is no such file"]),
    ("data=jsonl data.path=empty.jsonl", ["empty.jsonl is empty"]),
    ("data=jsonl data.path=malformed.jsonl", ["malformed.jsonl, line 2: malformed JSON"]),
    ("data=jsonl data.path=no_prompt.jsonl", ["no_prompt.jsonl, line 2"]),
    ("data=jsonl data.path=latin.jsonl", ["latin.jsonl", "UTF-8"]),
    (
        "data=jsonl data.path=anwser.jsonl reward=exact_match",
        [
            "reward.answer_field=answer: no row of anwser.jsonl has an answer",
            "other fields: anwser",
            "data.answer_field",
        ],
    ),
    (
        "data=jsonl data.path=half.jsonl reward=exact_match reward.answer_field=labl",
        ["reward.answer_field=labl: the rows of half.jsonl have no such column", "did you mean label?"],
    ),
    (
        f"data=jsonl data.path=half.jsonl {DEMONSTRATED}",
        ["rollout.demonstration_field=golden_response: half.jsonl, row 4", "data.require=[golden_response]"],
    ),
    (
        f"data=jsonl data.path=half.jsonl {DEMONSTRATED} data.require=[golden_response]",
        ["half.jsonl, line 4: field 'golden_response' is empty", "data.on_bad_row=skip"],
    ),
    (
        f"data=jsonl data.path=half.jsonl {DEMONSTRATED} rollout.demonstration_field=labels",
        ["rollout.demonstration_field=labels: the rows of half.jsonl have no such column", "did you mean label?"],
    ),
    ("data=jsonl data.path=mine", ["data.path=mine is a folder"]),
    ("data.path=embedded:absent", ["data.path=embedded:absent", "half_known_train"]),
    ("data.on_bad_row=ignore", ["data.on_bad_row=ignore", "error or skip"]),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with bad files in it."""
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "malformed.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": \n')
    (tmp_path / "no_prompt.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"promt": "c", "answer": "d"}\n')
    (tmp_path / "anwser.jsonl").write_text("".join(f'{{"prompt": "{i}", "anwser": "b"}}\n' for i in range(20)))
    demonstrations = ["null" if i == 3 else '["b"]' for i in range(20)]
    rows = [f'{{"prompt": "{i}", "label": "c", "golden_response": {d}}}\n' for i, d in enumerate(demonstrations)]
    (tmp_path / "half.jsonl").write_text("".join(rows))
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "a", "answer": "é"}\n'.encode("latin-1"))
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "broken.yaml").write_text("name: x\nlora: {r: 8\n")
    return tmp_path


def check_refusal(code: int, err: str, left: set[str], words: list[str]) -> None:
    assert code == 2, err
    assert err.startswith("selfdistill: ")
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    assert "append to your config" not in err  # what Hydra advises, and what would let a typing error pass
    for word in words:
        assert word in err, err
    assert not left


@pytest.mark.parametrize(("line", "words"), sampled(COMPOSITION))
def test_refused_by_the_composition(line: str, words: list[str], folder: Path) -> None:
    outcome = command(line.split(), folder)
    check_refusal(outcome.code, outcome.err, outcome.left, words)


@pytest.mark.parametrize(("line", "words"), sampled(LOADING))
def test_refused_before_the_run_begins(line: str, words: list[str], folder: Path) -> None:
    outcome = command(line.split(), folder)
    check_refusal(outcome.code, outcome.err, outcome.left, words)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("+model.lora.ranks=3", ["model.lora.ranks is not a key"]),
        ("--multirun beta=0,-1", ["beta=-1 is out of range"]),
        ("data=jsonl data.path=malformed.jsonl", ["malformed.jsonl, line 2: malformed JSON"]),
    ],
)
def test_refused_as_a_process_from_another_folder(line: str, words: list[str], folder: Path) -> None:
    before = set(folder.rglob("*"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "selfdistill.train", *line.split()],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    check_refusal(done.returncode, done.stderr, {str(path) for path in set(folder.rglob("*")) - before}, words)


def test_a_folder_that_a_refused_run_was_given_stays(folder: Path) -> None:
    (folder / "runs").mkdir()
    outcome = command(["output_dir=runs", "data=jsonl", "data.path=empty.jsonl"], folder)
    assert outcome.code == 2
    assert list((folder / "runs").iterdir()) == []


def test_folders_made_for_a_refused_run_go_with_it(folder: Path) -> None:
    outcome = command(["output_dir=new/runs", "data=jsonl", "data.path=empty.jsonl"], folder)
    check_refusal(outcome.code, outcome.err, outcome.left, ["empty.jsonl"])


def test_a_module_that_cannot_be_imported_is_named_with_its_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "half_done_reward.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    line = ["reward=function", "trusted_prefixes=[half_done_reward]", "reward._target_=half_done_reward.score"]
    outcome = command(line, folder)
    check_refusal(
        outcome.code, outcome.err, outcome.left, ["half_done_reward cannot be imported", "no_such_dependency"]
    )


def test_the_configuration_of_a_resumed_run_is_checked(folder: Path) -> None:
    (folder / "old").mkdir()
    (folder / "old" / "summary.json").write_text('{"run_id": "old"}')
    (folder / "old" / "config.yaml").write_text(OmegaConf.to_yaml(composed(["beta=-1"]), resolve=True))
    outcome = command(["resume=old"], folder)
    check_refusal(outcome.code, outcome.err, outcome.left, ["old/config.yaml: beta=-1", "out of range"])
    outcome = command(["resume=old", "seed=3"], folder)
    check_refusal(outcome.code, outcome.err, outcome.left, ["seed cannot be changed when a run is resumed"])


@pytest.mark.long
@pytest.mark.parametrize("door", ["resume", "repeat"])
@pytest.mark.parametrize(
    ("written", "given", "words"),
    [
        (["reward._target_=numpy.load"], [], ["only selfdistill, trl.rewards are trusted"]),
        (["+training.arguments.hub_token='***'"], [], ["training.arguments.hub_token is secret and was not recorded"]),
        (["+training.arguments.hub_token='***'", "beta=-1"], ["++training.arguments.hub_token=x"], ["beta=-1 is out"]),
    ],
)
def test_a_folder_from_somebody_else_has_no_trust_and_no_secrets(
    door: str, written: list[str], given: list[str], words: list[str], folder: Path
) -> None:
    (folder / "old").mkdir()
    (folder / "old" / "summary.json").write_text('{"run_id": "old"}')
    (folder / "old" / "config.yaml").write_text(OmegaConf.to_yaml(composed(written), resolve=True))
    outcome = command([f"{door}=old", *given], folder)
    check_refusal(outcome.code, outcome.err, outcome.left, words)
