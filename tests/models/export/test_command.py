import fcntl
import json
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel

from selfdistill import export
from selfdistill.errors import UserError
from selfdistill.models import loading
from selfdistill.runs.finished import load_policy, read_run
from selfdistill.runs.folder import RunFolder
from selfdistill.training.checkpoints import mark
from tests.command import Outcome, command
from tests.models.export.conftest import load_base
from tests.tiny import tiny_tokenizer


@pytest.fixture
def run_folder(tmp_path, base_folder):
    """A run's folder that is over but has no weights yet."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        f"model:\n  name: {base_folder}\n  tuning: lora\n  retention_path: null\n  lora: {{r: 4}}\n"
    )
    (folder / "summary.json").write_text(json.dumps({"run_id": "run", "status": "finished"}))
    return folder


def exported(run_folder: Path, *arguments: str, code: int = 0) -> Outcome:
    outcome = command([f"run={run_folder}", *arguments], run_folder.parent, export)
    assert outcome.code == code, outcome.err
    return outcome


def save_adapter(adapted, folder):
    adapted.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    mark(folder)


@pytest.fixture
def models(monkeypatch):
    """Stands in for loading a model; remembers what it was asked for."""
    asked = []

    def load_model(*, name, tuning="lora", lora=None, revision=None, adapter_path=None):
        asked.append({"name": name, "tuning": tuning, "lora": lora, "adapter_path": adapter_path})
        model = load_base(name)
        return PeftModel.from_pretrained(model, adapter_path) if adapter_path else model, tiny_tokenizer()

    import selfdistill.training.build  # noqa: F401 - it must not find the stand-in when it is first imported

    monkeypatch.setattr(loading, "load_model", load_model)
    return asked


@pytest.mark.parametrize("name", ["lora", "merged_16bit"])
def test_a_finished_lora_run_is_exported(run_folder, base_folder, adapted, models, name):
    save_adapter(adapted, run_folder / "model")
    prompt = [{"role": "user", "content": "shout hi"}]
    lines = [json.dumps({"step": 1, "prompt": prompt, "completion": "x"})] * 2
    lines += [json.dumps({"step": 1, "prompt": "plain"}), '{"pro']
    (run_folder / "completions.jsonl").write_text("\n".join(lines))
    outcome = exported(run_folder, f"export={name}")
    folder = run_folder / "export" / name
    assert str(folder) in outcome.out.splitlines()
    found = json.loads((folder / "verification.json").read_text())
    assert found["verdict"] == "equal"
    assert found["training_kl"] > 0
    assert found["prompts"] == 2
    assert models == [
        {"name": str(base_folder), "tuning": "lora", "lora": {"r": 4}, "adapter_path": str(run_folder / "model")}
    ]


def test_a_run_of_all_weights_is_exported_from_its_newest_whole_checkpoint(run_folder, base, models):
    (run_folder / "config.yaml").write_text("model: {name: somewhere/else, tuning: full, lora: null, revision: v1}\n")
    for step in (9, 10, 11):
        checkpoint = run_folder / "checkpoints" / f"checkpoint-{step}"
        with torch.no_grad():
            base.model.norm.weight.fill_(float(step))
        base.save_pretrained(checkpoint)
        if step != 11:
            mark(checkpoint)
    exported(run_folder, "export=merged_16bit", "export.dtype=float16")
    newest = run_folder / "checkpoints" / "checkpoint-10"
    assert models == [{"name": str(newest), "tuning": "full", "lora": None, "adapter_path": None}]
    written = load_base(run_folder / "export" / "merged_16bit", dtype="auto")
    assert written.dtype == torch.float16
    assert written.model.norm.weight[0].item() == 10.0
    assert "model.tuning=full" in exported(run_folder, "export=lora", code=1).err
    exported(run_folder, "checkpoint=9", "export=merged_16bit")
    earlier = run_folder / "export" / "checkpoint-9" / "merged_16bit"
    assert load_base(earlier).model.norm.weight[0].item() == 9.0
    assert "- weights: `checkpoint-9`" in (earlier / "README.md").read_text()
    said = exported(run_folder, "checkpoint=12", "export=merged_16bit", code=2).err
    assert "checkpoint=12: there are no weights of that name" in said
    assert "checkpoint-10, checkpoint-11, checkpoint-9" in said


def test_an_export_is_noted_and_its_page_tells_of_the_run(run_folder, adapted, models):
    save_adapter(adapted, run_folder / "model")
    summary = json.loads((run_folder / "summary.json").read_text())
    results = {"before": {"eval/forgetting": 0.0}, "after": {"eval/forgetting": 0.125}}
    (run_folder / "summary.json").write_text(json.dumps(summary | {"eval": results, "train_rows": 40}))
    config = run_folder / "config.yaml"
    config.write_text(config.read_text() + "data: {path: my.jsonl}\nseed: 3\nmax_steps: 7\n")
    outcome = exported(run_folder, "export=[lora,merged_16bit]")
    noted = json.loads((run_folder / "summary.json").read_text())["export"]
    assert noted == {name: {"folder": str(run_folder / "export" / name)} for name in ("lora", "merged_16bit")}
    assert "lora: loading it again and comparing" in outcome.err
    for name in noted:
        page = (run_folder / "export" / name / "README.md").read_text()
        for part in ("- data: `my.jsonl`, 40 rows", "| eval/forgetting | 0.000 | 0.125 |", "max_steps: 7", "seed 3"):
            assert part in page


def test_weights_of_unsloth_are_loaded_without_it(run_folder, base, monkeypatch):
    """Unsloth adds a fresh adapter to whatever it loads."""
    config = run_folder / "config.yaml"
    config.write_text(config.read_text().replace("tuning: lora", "tuning: full\n  loader: unsloth"))
    base.save_pretrained(run_folder / "model")
    tiny_tokenizer().save_pretrained(run_folder / "model")
    monkeypatch.setitem(sys.modules, "unsloth", None)  # importing it fails
    model, _ = load_policy(read_run(run_folder))
    assert (type(model), model.name_or_path) == (type(base), str(run_folder / "model"))


def test_a_base_beside_the_run_is_found_from_any_folder(run_folder, base_folder, adapted, monkeypatch):
    save_adapter(adapted, run_folder / "model")
    config = run_folder / "config.yaml"
    config.write_text(config.read_text().replace(str(base_folder), base_folder.name))
    summary = {"run_id": "run", "status": "finished", "folder": str(base_folder.parent)}
    (run_folder / "summary.json").write_text(json.dumps(summary))
    monkeypatch.chdir("/")
    assert read_run(run_folder).model["name"] == str(base_folder)


@pytest.mark.long
def test_a_failed_export_harms_no_run_and_says_what_to_install(tmp_path):
    line = ["debug=fast", "eval=none", "hardware=cpu", "hydra.run.dir=run", f"export.llama_cpp={tmp_path}"]
    line += ["training.checkpoint_every=2"]
    outcome = command([*line, "export=[merged_16bit,gguf]"], tmp_path)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("run `make gguf`") == 2  # before the training and at the end
    assert "again: python -m selfdistill.export" in outcome.out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["export"]["merged_16bit"] == {"folder": str(tmp_path / "run" / "export" / "merged_16bit")}
    assert "its converter" in summary["export"]["gguf"]["error"]
    assert command(["resume=run", "max_steps=3", f"++export.llama_cpp={tmp_path}"], tmp_path).code == 0
    page = (tmp_path / "run" / "export" / "merged_16bit" / "README.md").read_text()
    assert "max_steps: 3" in page


def test_the_tokenizer_is_the_runs_own(run_folder, adapted, models):
    save_adapter(adapted, run_folder / "model")
    template = run_folder / "model" / "chat_template.jinja"
    template.write_text("Question:" + template.read_text())
    exported(run_folder, "export=lora")
    assert (run_folder / "export" / "lora" / "chat_template.jinja").read_text().startswith("Question:")


def test_the_models_folder_comes_before_checkpoints(run_folder, adapted):
    save_adapter(adapted, run_folder / "checkpoints" / "checkpoint-5")
    assert read_run(run_folder).weights.name == "checkpoint-5"
    save_adapter(adapted, run_folder / "model")
    assert read_run(run_folder).weights == run_folder / "model"


def test_a_run_that_is_not_over_needs_force(run_folder, adapted):
    save_adapter(adapted, run_folder / "model")
    summary, lock = run_folder / "summary.json", run_folder / ".lock"
    summary.write_text(json.dumps({"run_id": "run", "status": "running"}))

    def refused():
        with pytest.raises(UserError, match="is still running"):
            read_run(run_folder)
        assert read_run(run_folder, force=True).weights.name == "model"

    refused()
    with lock.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused()
    assert read_run(run_folder).weights.name == "model"  # its process was killed
    lock.unlink()
    for status in ("finished", "failed", "interrupted", "stopped"):
        summary.write_text(json.dumps({"run_id": "run", "status": status}))
        assert read_run(run_folder).weights.name == "model"
    summary.unlink()
    with pytest.raises(UserError, match=r"summary\.json is missing"):
        read_run(run_folder, force=True)


def test_a_run_that_its_process_still_writes_is_refused(run_folder, adapted):
    save_adapter(adapted, run_folder / "model")
    run = RunFolder.create(run_folder.parent / "runs", "x", OmegaConf.load(run_folder / "config.yaml"))
    (run_folder / "model").rename(run.path / "model")
    with pytest.raises(UserError, match="is still running"):
        read_run(run.path)
    run.finish("finished")
    assert read_run(run.path).weights == run.path / "model"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", r"config\.yaml cannot be read"),
        ("model: {name: ${nowhere}}", r"config\.yaml cannot be read"),
        ("trainer: {}", r"config\.yaml has no model\.name"),
        ("- 1", r"config\.yaml is not a configuration: it holds a list"),
    ],
)
def test_a_broken_configuration_is_named(run_folder, content, message):
    (run_folder / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        read_run(run_folder)


def test_a_broken_summary_and_missing_weights_are_named(run_folder):
    with pytest.raises(UserError, match=r"has no weights: neither model/ nor"):
        read_run(run_folder)
    (run_folder / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json is no run's summary"):
        read_run(run_folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run is missing: write run="),
        (["run={tmp}/none", "export=lora"], "there is no such folder"),
        (["run={tmp}", "export=lora"], "is no run's folder: config.yaml and summary.json are missing"),
        (["run={tmp}", "export=merged_16"], "export=merged_16: there is no such choice; did you mean merged_16bit?"),
        (
            ["run={tmp}", "export=zip"],
            "export=zip: there is no such choice; known here: gguf, lora, merged_16bit, merged_4bit",
        ),
        (
            ["run={tmp}", "export=none"],
            "export= is missing: write export=FORMAT, FORMAT one of gguf, lora, merged_16bit, merged_4bit.",
        ),
        (["run={tmp}"], "export= is missing"),
        (["export=lora"], "run is missing"),
        (["run={tmp}", "export=lora", "exprot.dtype=float16"], "exprot.dtype is not a key"),
        (["run={tmp}", "exprt=lora"], "exprt is not a key: did you mean export?"),
        (["run={tmp}", "export=merged_16bit", "export.dtyp=float16"], "export.dtyp is not a key: did you mean dtype?"),
        (["run={tmp}", "export=lora", "force=maybe"], "force: Value 'maybe'"),
        (["run={tmp}", "export=lora", "--fast"], "--fast is not a flag"),
        (["run={tmp}", "export=lora,gguf"], "for one list write export=[lora,gguf]"),
        (["run={tmp}", "export=[lora,zip]"], "export=zip: there is no such choice"),
        (["run={tmp}", "export=lora", "export.type=q8_0"], "export.type is not a key"),
        (["run={tmp}", "export=lora,merged_16bit", "-m"], "--multirun is for selfdistill.train alone"),
    ],
)
def test_a_wrong_command_gets_one_message_and_code_2(tmp_path, arguments, message):
    outcome = command([argument.format(tmp=tmp_path) for argument in arguments], tmp_path, export)
    assert (outcome.code, outcome.left) == (2, set())
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_an_export_that_is_not_trusted_is_refused(run_folder, adapted, models):
    save_adapter(adapted, run_folder / "model")
    outcome = exported(run_folder, "export=lora", "export.formats.lora._target_=os.system", code=2)
    assert "trusted_prefixes=[os]" in outcome.err
    assert models == []


def test_help_lists_the_formats_and_the_keys(tmp_path):
    outcome = command(["--help"], tmp_path, export)
    assert (outcome.code, outcome.err) == (0, "")
    for part in ("\n  merged_16bit ", "\n  lora ", "\nforce: false ", "run=outputs/RUN_ID export=merged_16bit"):
        assert part in outcome.out


def test_a_wrong_dtype_is_refused_before_the_weights_load(run_folder, adapted, models):
    save_adapter(adapted, run_folder / "model")
    outcome = exported(run_folder, "export=merged_16bit", "export.dtype=int8", code=2)
    assert "selfdistill: export.dtype=int8" in outcome.err
    assert models == []
