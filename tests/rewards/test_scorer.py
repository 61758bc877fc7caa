import copy

import peft
import pytest
import torch

from selfdistill.models.structure import evaluating
from selfdistill.rewards import PolicyReward, PolicyScorer
from selfdistill.rewards.scorer import to_lists
from tests.rewards.fakes import CharTokenizer, TableModel, ids
from tests.tiny import tiny_model, tiny_tokenizer


def rows(count: int = 9, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions of many lengths, one completion empty."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(6, 102, (length,), generator=generator).tolist()

    completions = [draw(1, 12) for _ in range(count)]
    completions[3] = []
    return [draw(1, 15) for _ in range(count)], completions


@torch.no_grad()
def one_by_one(model, prompts, completions) -> list[torch.Tensor]:
    """The plain definition: one row, one forward pass, all logits."""
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double()
        predicting = logits[len(prompt) - 1 : len(prompt) - 1 + len(completion)].log_softmax(-1)
        expected.append(predicting[range(len(completion)), completion])
    return expected


def close(found, expected, tolerance=1e-5):
    assert [len(row) for row in found] == [len(row) for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 16384])
@pytest.mark.parametrize("tied", [True, False])
def test_batched_values_are_those_of_one_row_at_a_time(micro_batch_tokens, tied):
    model, (prompts, completions) = tiny_model(tied=tied), rows()
    scorer = PolicyScorer(model, tiny_tokenizer(), micro_batch_tokens=micro_batch_tokens)
    close(scorer.token_logprobs(prompts, completions), one_by_one(model, prompts, completions))


def test_statistics_follow_their_definitions():
    model, (prompts, completions) = tiny_model(1), rows(seed=1)
    found = PolicyScorer(model, tiny_tokenizer()).token_statistics(prompts, completions)
    close(found.logprobs, one_by_one(model, prompts, completions))
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double()
        logits = logits[len(prompt) - 1 : len(prompt) - 1 + len(completion)]
        p = logits.softmax(-1)
        entropy = torch.distributions.Categorical(probs=p).entropy()
        divergence = ((1 / 102) * ((1 / 102) / p).log()).sum(-1) + torch.tensor(102.0).log()
        torch.testing.assert_close(found.entropy[row].double(), entropy, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.self_certainty[row].double(), divergence, rtol=1e-5, atol=1e-5)


def test_targets_may_differ_from_what_was_written():
    table = torch.randn(28, 28, generator=torch.Generator().manual_seed(2))
    scorer = PolicyScorer(TableModel(table), CharTokenizer())
    (found,) = scorer.token_logprobs([ids("ab")], [ids("cde")], [ids("xy")])
    logprobs = table.log_softmax(-1)
    expected = torch.stack([logprobs[ids("b")[0], ids("x")[0]], logprobs[ids("c")[0], ids("y")[0]]])
    torch.testing.assert_close(found, expected)


def test_temperature_divides_the_logits():
    table = torch.randn(28, 28, generator=torch.Generator().manual_seed(3))
    (found,) = PolicyScorer(TableModel(table), CharTokenizer(), temperature=2.0).token_logprobs([ids("a")], [ids("b")])
    torch.testing.assert_close(found, (table / 2).log_softmax(-1)[0, 1:2])


def test_modes_of_all_submodules_are_restored_and_dropout_is_off():
    model = tiny_model(4)
    model.config.attention_dropout = 0.9
    model = type(model)(model.config).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    prompts, completions = rows()
    scorer = PolicyScorer(model, tiny_tokenizer())
    first, second = scorer.token_logprobs(prompts, completions), scorer.token_logprobs(prompts, completions)
    close(first, second, 0.0)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert [module.training for module in model.modules()] == before


def groups() -> tuple[list[list[int]], list[list[int]]]:
    """Four prompts of different lengths, five completions each."""
    prompts, completions = rows(20, seed=7)
    return [[9, *prompts[row // 5], *prompts[row // 5]] for row in range(20)], completions


def counted(model) -> list[int]:
    """Tokens of each call from now on."""
    calls = []
    model.register_forward_pre_hook(lambda _, __, call: calls.append(call["input_ids"].numel()), with_kwargs=True)
    return calls


@pytest.mark.parametrize("micro_batch_tokens", [70, 16384])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_completions_of_one_prompt_share_its_pass(micro_batch_tokens, attention):
    model = copy.deepcopy(tiny_model(7))
    model.set_attn_implementation(attention)
    prompts, completions = groups()
    expected = one_by_one(model, prompts, completions)
    calls = counted(model)
    scorer = PolicyScorer(model, tiny_tokenizer(), micro_batch_tokens=micro_batch_tokens)
    close(scorer.token_logprobs(prompts, completions), expected)
    if micro_batch_tokens == 16384:
        distinct = {tuple(prompt) for prompt in prompts}
        longest = max(map(len, distinct)) - 1
        assert calls == [1, len(distinct) * longest, 19 * max(map(len, completions))]  # one completion is empty


def test_sharing_stays_within_its_memory(monkeypatch):
    model, (prompts, completions) = copy.deepcopy(tiny_model(7)), groups()
    expected = one_by_one(model, prompts, completions)
    calls = counted(model)
    bytes_per_token = 2 * 2 * 1 * 16 * 4  # keys and values, layers, heads, width, float32
    monkeypatch.setattr("selfdistill.rewards.scorer.CACHE_AT_ONCE", 200 * bytes_per_token)
    close(PolicyScorer(model, tiny_tokenizer()).token_logprobs(prompts, completions), expected)
    assert len(calls) > 3


def test_a_model_with_a_sliding_window_shares_nothing():
    config = copy.deepcopy(tiny_model().config)
    config.layer_types, config.sliding_window, config.use_sliding_window = ["sliding_attention"] * 2, 4, True
    torch.manual_seed(0)
    model, (prompts, completions) = type(tiny_model())(config).eval(), groups()
    scorer = PolicyScorer(model, tiny_tokenizer())
    close(scorer.token_logprobs(prompts, completions), one_by_one(model, prompts, completions))
    assert scorer._shares_prompts is False


@pytest.mark.parametrize("micro_batch_tokens", [1, 16384])
def test_a_learned_prompt_counts(micro_batch_tokens):
    torch.manual_seed(0)
    adapter = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(copy.deepcopy(tiny_model()), adapter).eval()
    prompts, completions = groups()
    scorer = PolicyScorer(model, tiny_tokenizer(), micro_batch_tokens=micro_batch_tokens)
    for row, prompt, completion in zip(scorer.token_logprobs(prompts, completions), prompts, completions, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, -len(completion) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


def test_no_gradient_is_recorded():
    prompts, completions = rows()
    found = PolicyScorer(tiny_model(), tiny_tokenizer()).token_logprobs(prompts, completions)
    assert not any(row.requires_grad for row in found)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_counts(targets):
    torch.manual_seed(0)
    base = copy.deepcopy(tiny_model(5, tied=False))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    prompts, completions = groups()
    scorer = PolicyScorer(model, tiny_tokenizer())
    expected = one_by_one(model.eval(), prompts, completions)
    found = scorer.token_logprobs(prompts, completions)
    close(found, expected)
    with model.disable_adapter():
        without = scorer.token_logprobs(prompts, completions)
    assert max(float((a - b).abs().max()) for a, b in zip(found, without, strict=True) if len(a)) > 1e-3


def test_the_head_sees_the_needed_positions_alone():
    model, (prompts, completions) = tiny_model(), rows()
    seen = []
    forward = model.lm_head.forward
    scorer = PolicyScorer(model, tiny_tokenizer())
    model.lm_head.forward = lambda hidden: seen.append(hidden.shape[:-1].numel()) or forward(hidden)
    try:
        scorer.token_logprobs(prompts, completions)
    finally:
        del model.lm_head.forward
    # All targets once, and single tokens: the first look at the model (twice), and what the model itself is left with.
    assert sorted(seen) == sorted([sum(map(len, completions)), 1, 1, 1])


def test_logits_are_read_in_chunks(monkeypatch):
    model, (prompts, completions) = tiny_model(), rows()
    expected = one_by_one(model, prompts, completions)
    monkeypatch.setattr("selfdistill.rewards.scorer.LOGITS_AT_ONCE", 102 * 5)
    largest = []
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: largest.append(hidden.shape[:-1].numel()) or head(hidden)
    try:
        close(PolicyScorer(model, tiny_tokenizer()).token_logprobs(prompts, completions), expected)
    finally:
        del model.lm_head.forward
    assert max(largest) == 5


@pytest.mark.parametrize("setting", [{}, {"final_logit_softcapping": 0.3}, {"logit_scale": 3.0}])
def test_what_a_model_does_behind_its_head_is_kept(setting):
    class Finished(type(tiny_model())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if "logit_scale" in setting:
                output.logits = output.logits * setting["logit_scale"]
            elif setting:
                cap = setting["final_logit_softcapping"]
                output.logits = torch.tanh(output.logits / cap) * cap
            else:  # nothing that the configuration tells: the whole logits have to be taken
                output.logits = output.logits + torch.linspace(0, 2, output.logits.shape[-1])
            return output

    config = copy.deepcopy(tiny_model().config)
    for key, value in setting.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model, (prompts, completions) = Finished(config).eval(), groups()
    found = PolicyScorer(model, tiny_tokenizer()).token_logprobs(prompts, completions)
    close(found, one_by_one(model, prompts, completions))


def test_autocast_applies():
    model, (prompts, completions) = tiny_model(6), rows()
    scorer = PolicyScorer(model, tiny_tokenizer())
    exact = scorer.token_logprobs(prompts, completions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = scorer.token_logprobs(prompts, completions)
    close(rough, exact, 0.05)
    assert any(not torch.equal(a, b) for a, b in zip(rough, exact, strict=True))
    assert all(row.dtype == torch.float32 for row in rough)


def test_misuse_is_refused():
    scorer = PolicyScorer(tiny_model(), tiny_tokenizer())
    with pytest.raises(ValueError, match="row 1 has an empty prompt"):
        scorer.token_logprobs([[7], []], [[8], [9]])
    with pytest.raises(ValueError, match="3 targets for 1"):
        scorer.token_logprobs([[7]], [[8]], [[1, 2, 3]])
    with pytest.raises(ValueError, match="1 prompts, 2 completions"):
        scorer.token_logprobs([[7]], [[8], [9]])
    with pytest.raises(ValueError, match="temperature"):
        PolicyScorer(tiny_model(), tiny_tokenizer(), temperature=0.0)
    assert scorer.token_logprobs([], []) == []


def test_prompts_are_encoded_as_the_trainer_does():
    class Ids(PolicyReward):
        def _scores(self, prompt_ids, completion_ids, logprobs, columns):
            self.seen = prompt_ids, completion_ids
            return []

    tokenizer, reward = tiny_tokenizer(), Ids()
    reward.bind(PolicyScorer(tiny_model(), tokenizer))
    reward(
        prompts=[[{"role": "user", "content": "hi"}], "hi"],
        completions=["hi", [{"role": "assistant", "content": "hi"}]],
    )
    prompts, completions = reward.seen
    assert tokenizer.decode(prompts[0]) == "<|user|>hi<|end|><|assistant|>"
    assert prompts[1] == tokenizer("hi")["input_ids"]
    assert completions == [tokenizer("hi").input_ids] * 2


def test_to_lists_keeps_rows_apart():
    assert to_lists([torch.tensor([1.0, 2.0]), torch.empty(0), torch.tensor([3.0])]) == [[1.0, 2.0], [], [3.0]]
    assert to_lists([]) == []
