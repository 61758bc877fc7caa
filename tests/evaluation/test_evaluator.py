import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from selfdistill.errors import UserError
from selfdistill.evaluation.evaluator import EvalSettings, Evaluator, forgetting, load_retention
from selfdistill.models.generation import completion_logits, generate, tokenize
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["ab", "reverse hello", "x", "add 12 and 30", "the last of a b c"]


def equals_answer(*, completions, answer, **_):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(text == wanted) for text, wanted in zip(texts, answer, strict=True)]


def rows(*answers, chat=True):
    prompts = [[{"role": "user", "content": p}] if chat else p for p in PROMPTS]
    return [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=False)]


def greedy_one_by_one(model, ids, end, steps):
    """The definition: without cache or padding, the argmax after each prefix."""
    ids, out = list(ids), []
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(torch.tensor([ids + out]), use_cache=False).logits[0, -1].argmax())
        out.append(token)
        if token == end:
            break
    return out


def prompt_ids():
    return [tokenize([{"role": "user", "content": p}], tiny_tokenizer()) for p in PROMPTS]


def lively_model(seed=0):
    """A random model whose answers vary: larger weights, so that not every answer is one token repeated."""
    model = tiny_model(seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def test_generate_is_the_argmax_of_each_prompt_alone():
    model, tokenizer = lively_model(), tiny_tokenizer()
    end = tokenizer.eos_token_id
    found = generate(model, prompt_ids(), tokenizer=tokenizer, max_new_tokens=12, batch_size=2)
    assert found == [greedy_one_by_one(model, ids, end, 12) for ids in prompt_ids()]
    assert len({tuple(ids) for ids in found}) > 1


def test_generate_ignores_the_models_generation_settings_and_restores_them():
    model, tokenizer = lively_model(), tiny_tokenizer()
    plain = generate(model, prompt_ids(), tokenizer=tokenizer, max_new_tokens=12)
    own = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=4.0, eos_token_id=2, pad_token_id=0
    )
    model.generation_config = own
    assert generate(model, prompt_ids(), tokenizer=tokenizer, max_new_tokens=12) == plain
    assert model.generation_config is own


def test_generate_uses_the_cache_under_gradient_checkpointing_and_restores_the_mode():
    model, tokenizer = lively_model(), tiny_tokenizer()
    plain = generate(model, prompt_ids(), tokenizer=tokenizer, max_new_tokens=12)
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    widths = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assert generate(model, prompt_ids(), tokenizer=tokenizer, max_new_tokens=12) == plain
    hook.remove()
    assert len(widths) > 2
    assert set(widths[1:]) == {1}
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False


def test_generate_keeps_the_models_own_end_tokens():
    model, tokenizer = lively_model(), tiny_tokenizer()
    ids = prompt_ids()[1]
    answer = generate(model, [ids], tokenizer=tokenizer, max_new_tokens=12)[0]
    model.generation_config.eos_token_id = [2, answer[3]]
    first = answer.index(answer[3])
    assert generate(model, [ids], tokenizer=tokenizer, max_new_tokens=12)[0] == answer[: first + 1]


def test_sampling_is_seeded_and_leaves_the_random_state_alone():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    draw = {seed: generate(model, prompt_ids(), tokenizer=tokenizer, max_new_tokens=8, temperature=1.0, seed=seed)
            for seed in (0, 1)}  # fmt: skip
    assert torch.equal(torch.rand(3), expected)
    assert draw[0] == generate(model, prompt_ids(), tokenizer=tokenizer, max_new_tokens=8, temperature=1.0, seed=0)
    assert draw[0] != draw[1]


@pytest.mark.parametrize("chat", [True, False])
def test_evaluate_scores_task_and_suites_in_order(chat):
    model, tokenizer = lively_model(), tiny_tokenizer()
    ids = [tokenize(row["prompt"], tokenizer) for row in rows(*PROMPTS, chat=chat)]
    answers = [
        tokenizer.decode(out, skip_special_tokens=True)
        for out in generate(model, ids, tokenizer=tokenizer, max_new_tokens=6)
    ]
    seen = []

    def spy(**kwargs):
        seen.append(kwargs)
        return [{"score": value, "feedback": "x"} for value in equals_answer(**kwargs)]

    evaluator = Evaluator(
        EvalSettings(spy, spy, max_new_tokens=6, batch_size=3),
        rows(answers[0], "no", answers[2], "no", chat=chat),
        {"a": rows(*answers, chat=chat), "b": rows("no", answers[1], chat=chat)},
    )
    found = evaluator.evaluate(model, tokenizer)
    assert found.metrics == {
        "eval/accuracy": 0.5, "eval/retention/a": 1.0, "eval/retention/b": 0.5, "eval/retention": 0.75,
    }  # fmt: skip
    assert [(item.suite, item.row, item.answer, item.verdict) for item in found.items[3:6]] == [
        (None, "3", answers[3], 0.0), ("a", "0", answers[0], 1.0), ("a", "1", answers[1], 1.0),
    ]  # fmt: skip
    assert found.items[9].prompt == rows("no", "no", chat=chat)[0]["prompt"]
    assert [len(call["prompts"]) for call in seen] == [4, 5, 2]
    assert [c[0]["content"] if chat else c for c in seen[0]["completions"]] == answers[:4]
    assert isinstance(seen[0]["completions"][0], list if chat else str)
    assert seen[0]["answer"] == [answers[0], "no", answers[2], "no"]
    assert "suite" not in seen[0]


def test_evaluate_works_on_a_peft_model_with_its_adapter():
    model, tokenizer = lively_model(), tiny_tokenizer()
    plain = generate(model, prompt_ids(), tokenizer=tokenizer, max_new_tokens=8)
    torch.manual_seed(0)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted = generate(peft_model, prompt_ids(), tokenizer=tokenizer, max_new_tokens=8)
    assert adapted != plain
    with peft_model.disable_adapter():
        assert generate(peft_model, prompt_ids(), tokenizer=tokenizer, max_new_tokens=8) == plain


def test_rows_that_cannot_be_scored_are_left_out_of_the_mean():
    def half(*, prompts, **_):
        return [1.0, None, 0.0, None, 1.0][: len(prompts)]

    evaluator = Evaluator(EvalSettings(half, half, max_new_tokens=2), rows(*PROMPTS), {})
    assert evaluator.evaluate(tiny_model(), tiny_tokenizer()).metrics == {"eval/accuracy": pytest.approx(2 / 3)}

    def none(*, prompts, **_):
        return [None] * len(prompts)

    evaluator = Evaluator(EvalSettings(none, none, max_new_tokens=2), rows("a"), {})
    with pytest.raises(UserError, match=r"eval\.scorer could judge none of 1 rows"):
        evaluator.evaluate(tiny_model(), tiny_tokenizer())


def test_a_row_without_prompt_is_named():
    with pytest.raises(UserError, match="row 1 of the retention suite 'old'"):
        Evaluator(EvalSettings(equals_answer, equals_answer), [], {"old": [*rows("a"), {"prompt": ""}]})


def evaluation(**retention):
    return {"eval/accuracy": 0.0} | {f"eval/retention/{suite}": value for suite, value in retention.items()}


def test_forgetting_is_the_mean_drop_and_gains_do_not_cancel_losses():
    assert forgetting(evaluation(a=0.9, b=0.5), evaluation(a=0.5, b=0.9)) == pytest.approx(0.2)
    assert forgetting(evaluation(a=0.5), evaluation(a=0.9)) == 0.0
    assert forgetting(evaluation(), evaluation()) is None
    with pytest.raises(ValueError, match="different suites"):
        forgetting(evaluation(a=1.0), evaluation(b=1.0))


def test_completion_logits_start_at_the_last_prompt_token():
    model = tiny_model()
    with torch.no_grad():
        full = model(torch.tensor([[5, 6, 7, 8, 9]])).logits[0]
        torch.testing.assert_close(completion_logits(model, [5, 6], [7, 8, 9]), full[1:4])


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_load_retention_groups_by_suite_and_limits(tmp_path):
    path = write(
        tmp_path / "r.jsonl",
        *[{"suite": suite, "prompt": f"{suite}{i}", "answer": "1"} for i in range(3) for suite in "ab"],
        {"suite": "c", "prompt": "q", "system": "be brief"},
        "",
    )
    suites = load_retention(str(path), max_rows_per_suite=2)
    assert {suite: len(rows) for suite, rows in suites.items()} == {"a": 2, "b": 2, "c": 1}
    assert suites["a"][1]["prompt"] == [{"role": "user", "content": "a1"}]
    assert suites["c"][0]["prompt"][0] == {"role": "system", "content": "be brief"}
    assert load_retention(str(path), max_rows_per_suite=2, chat=False)["b"][0]["prompt"] == "b0"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"suite": "a", "prompt": "x"}, "{oops"], "r.jsonl, line 2: malformed JSON"),
        ([{"prompt": "x"}], "r.jsonl, line 1: the field 'suite' is missing"),
        ([{"suite": "a"}], "r.jsonl, line 1: no field 'prompt'"),
        ([[1]], "r.jsonl, line 1: "),
        ([""], "r.jsonl is empty"),
    ],
)
def test_load_retention_names_file_and_line(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        load_retention(str(write(tmp_path / "r.jsonl", *lines)), max_rows_per_suite=2)


def test_load_retention_without_file(tmp_path):
    with pytest.raises(UserError, match=r"eval\.retention_path=.*none.jsonl: there is no such file"):
        load_retention(str(tmp_path / "none.jsonl"), max_rows_per_suite=2)


def test_settings_limit_rows_and_check_ranges(tmp_path):
    path = write(tmp_path / "r.jsonl", *[{"suite": "a", "prompt": "x", "answer": "1"}] * 5)
    retention = load_retention(str(path), max_rows_per_suite=2)
    settings = EvalSettings(equals_answer, equals_answer, max_rows=3)
    evaluator = Evaluator(settings, iter(rows(*PROMPTS)), retention, seed=4)
    assert [len(group.rows) for group in evaluator.groups] == [3, 2]
    assert evaluator.seed == 4
    assert load_retention(None, max_rows_per_suite=2) == {}
    with pytest.raises(UserError, match=r"eval\.max_rows=0"):
        EvalSettings(equals_answer, equals_answer, max_rows=0)


def test_probes_are_other_tasks_judged_as_the_task_is():
    """They are no old skills: neither their mean nor what is forgotten covers them."""
    model, tokenizer = lively_model(), tiny_tokenizer()
    settings = EvalSettings(equals_answer, equals_answer, max_rows=3, max_new_tokens=4)
    ids = generate(model, prompt_ids()[:3], tokenizer=tokenizer, max_new_tokens=4)
    right = tokenizer.batch_decode(ids, skip_special_tokens=True)
    probe = [*rows(*right[:2], "never"), {"prompt": "beyond the limit", "answer": ""}]
    evaluator = Evaluator(settings, rows("never"), {"old": rows("never")}, probes={"near": iter(probe)})
    found = evaluator.evaluate(model, tokenizer)
    assert found.metrics == {
        "eval/accuracy": 0.0,
        "eval/task/near": pytest.approx(2 / 3),
        "eval/retention/old": 0.0,
        "eval/retention": 0.0,
    }
    assert [item.verdict for item in found.items if item.suite == "task/near"] == [1.0, 1.0, 0.0]
    with pytest.raises(UserError, match="row 0 of probes.near has no prompt"):
        Evaluator(settings, rows("a"), {}, probes={"near": [{"answer": "a"}]})
