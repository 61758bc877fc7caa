"""Run by `test_lm_eval`, in the environment that has lm-eval: its tasks on the model in memory, from local data."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from selfdistill.data.sources import embedded_file
from selfdistill.errors import UserError
from selfdistill.evaluation.harness import HarnessSettings
from selfdistill.models.generation import completion_logits
from selfdistill.models.loading import load_model
from selfdistill.rewards import ExactMatch
from tests.command import command

# The packages that lm-eval brings warn of their own ways.
pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = 12


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two tasks in lm-eval's format, of the embedded world: one to be answered, one to choose from."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = embedded_file("retention", "data.path").read_text().splitlines()
    calls = [row for row in map(json.loads, lines) if row["suite"] == "call"][:ROWS]
    # Both choices are wrong, so that which one is likelier is left to the model.
    others = [row["answer"] for row in calls[1:] + calls[:1]]
    choices = [
        {"prompt": row["prompt"], "choices": [row["answer"][::-1], other], "gold": place % 2}
        for place, (row, other) in enumerate(zip(calls, others, strict=True))
    ]
    for name, rows in (("calls", calls), ("choices", choices)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    common = "dataset_path: json\ndataset_kwargs:\n  data_files: {}\ntest_split: train\ndoc_to_text: '{{{{prompt}}}}'\n"
    (folder / "calls.yaml").write_text(
        "task: world_calls\n" + common.format(folder / "calls.jsonl") + "output_type: generate_until\n"
        "doc_to_target: '{{answer}}'\ngeneration_kwargs: {do_sample: false, max_gen_toks: 24, until: ['\\n']}\n"
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )
    (folder / "choices.yaml").write_text(
        "task: world_choices\n" + common.format(folder / "choices.jsonl") + "output_type: multiple_choice\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: gold\ntarget_delimiter: ''\n"
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    return {name: str(folder / f"{name}.yaml") for name in ("calls", "choices")}


def settings(*tasks: str, **options: Any) -> HarnessSettings:
    return HarnessSettings(None, ExactMatch(), tasks=tasks, **options)


def test_a_choice_is_the_one_that_the_model_holds_likelier(tasks: dict[str, str]) -> None:
    """Against the definition, of a model with an adapter in memory that changes its answers."""
    model, tokenizer = load_model(name="embedded", tuning="full")
    torch.manual_seed(0)
    adapted: Any = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    rows = [json.loads(line) for line in Path(tasks["choices"]).with_suffix(".jsonl").read_text().splitlines()]
    adapted.train()

    def likelihood(prompt: str, choice: str) -> float:
        prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(choice)
        logits = completion_logits(adapted, prompt_ids, ids).log_softmax(-1)
        return sum(float(logits[place, token]) for place, token in enumerate(ids))

    with torch.no_grad():
        adapted.eval()
        likelihoods = [[likelihood(row["prompt"], choice) for choice in row["choices"]] for row in rows]
        right = [both.index(max(both)) == row["gold"] for both, row in zip(likelihoods, rows, strict=True)]
        adapted.train()
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "1")  # the second process of several: it too is to know what was found
        found = settings(tasks["choices"]).measure(adapted, tokenizer, 5)
    assert found.metrics == {"eval/retention/world_choices": pytest.approx(sum(right) / ROWS)}
    assert 0 < sum(right) < ROWS, "a model that is always right shows nothing"
    assert [item.verdict for item in found.items] == [float(one) for one in right]
    assert {item.suite for item in found.items} == {"world_choices"}
    assert [item.prompt for item in found.items] == [row["prompt"] for row in rows]
    assert all(item.answer in row["choices"] for item, row in zip(found.items, rows, strict=True))
    # Nothing else is left otherwise than it was.
    assert adapted.training and torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()


def test_it_stands_in_the_tables_of_our_own_suites(tasks: dict[str, str], tmp_path: Path) -> None:
    """Before and after; the same rows, asked by lm-eval and by us, are answered alike."""
    run = [
        "experiment=sdpo", "eval=lm_eval", f"eval.tasks=[{tasks['calls']},{tasks['choices']}]", "max_steps=2",
        "eval.apply_chat_template=true", f"eval.max_rows_per_suite={ROWS}", "eval.max_rows=4", "completions_per_step=8",
        "num_generations=4", "hardware=cpu", "logger=none", "hydra.run.dir=run", "training.checkpoint_every=0",
    ]  # fmt: skip
    outcome = command(run, tmp_path)
    assert outcome.code == 0, outcome.err
    assert "Running generate_until" not in outcome.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for side in ("before", "after"):
        metrics = summary["eval"][side]
        suites = {name: value for name, value in metrics.items() if name.startswith("eval/retention/")}
        assert suites["eval/retention/world_calls"] == suites["eval/retention/call"] > 0.5
        assert len(suites) == 8 and metrics["eval/retention"] == pytest.approx(np.mean([*suites.values()]))
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    lost = [max(0.0, before[name] - after[name]) for name in before if name.startswith("eval/retention/")]
    assert after["eval/forgetting"] == pytest.approx(np.mean(lost))
    assert "retention/world_choices" in outcome.out
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    of_task = [line for line in lines if line["suite"] == "world_calls" and line["step"] == 2]
    assert len(of_task) == ROWS
    assert np.mean([line["verdict"] for line in of_task]) == after["eval/retention/world_calls"]


def test_what_cannot_be_measured_is_said(tasks: dict[str, str], tmp_path: Path) -> None:
    model, tokenizer = load_model(name="embedded", tuning="full")
    with pytest.raises(UserError, match="lm-eval has no task helaswag"):
        settings("helaswag").measure(model, tokenizer, 0)
    with pytest.raises(UserError, match=r"eval\.metric=f1: the task world_choices has no such metric; it has acc"):
        settings(tasks["choices"], metric="f1").measure(model, tokenizer, 0)
    less = tmp_path / "less.yaml"
    less.write_text(Path(tasks["choices"]).read_text().replace("higher_is_better: true", "higher_is_better: false"))
    with pytest.raises(UserError, match="acc less is better"):
        settings(str(less)).measure(model, tokenizer, 0)
    gone = tmp_path / "gone.yaml"
    gone.write_text(Path(tasks["choices"]).read_text().replace("choices.jsonl", "gone.jsonl"))
    with pytest.raises(UserError, match="lm-eval failed: FileNotFoundError"):
        settings(str(gone)).measure(model, tokenizer, 0)
