from selfdistill.rollout import Rollouts
from selfdistill.teachers.context import Feedback
from selfdistill.teachers.rendering import render
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def batch(prompt, n=2, **options) -> Rollouts:
    texts = ["ab", "c ``` d", "e", "f", "g", "h"][:n]
    return Rollouts(
        prompts=[prompt] * n,
        completions=texts,
        completion_ids=[[*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id] for text in texts],
        num_generations=n,
        **{"scores": [1.0] + [0.0] * (n - 1), "feedback": [None] * (n - 1) + ["No."], **options},
    )


def test_the_page_shows_what_both_saw_and_that_the_completion_is_the_same():
    rollouts = batch([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "go"}])
    prompts = Feedback(feedback_with_solution=True).prompts(rollouts, TOKENIZER)
    page = render(rollouts, prompts, TOKENIZER)
    assert "<|system|>Be brief.<|end|><|user|>go<|end|><|assistant|>\n" in page
    assert f"<|user|>{prompts[1][1]['content']}<|end|><|assistant|>\n" in page
    assert "**Teacher**: no signal for this rollout" in page.split("## Rollout 1")[0]
    assert "````text\nc ``` d\n````" in page
    assert " ".join(map(str, rollouts.completion_ids[1])) in page
    assert "**Score**: 0\n" in page and "**Feedback**\n\n```text\nNo.\n```" in page
    assert page.count("yes") == 6 and "NO" not in page


def test_it_says_where_the_real_sequences_differ():
    rollouts = batch("go")
    prompts = ["go", "go on"]
    ids = rollouts.completion_ids
    student = [TOKENIZER("go")["input_ids"] + ids[0], TOKENIZER("go")["input_ids"] + ids[1]]
    teacher = [[7, *TOKENIZER("go")["input_ids"], *ids[0]], TOKENIZER("go on")["input_ids"] + ids[1][:-1] + [9]]
    page = render(rollouts, prompts, TOKENIZER, student_ids=student, teacher_ids=teacher)
    first, second = page.split("## Rollout ")[1:]
    assert "teacher: begins with the ids of this prompt: **NO**" in first
    assert "teacher: ends in the completion's ids: yes" in first
    assert "teacher: begins with the ids of this prompt: yes" in second
    assert "teacher: ends in the completion's ids: **NO**" in second
    assert first.count("student: ") == 2 and "student: begins with the ids of this prompt: yes" in first


def test_the_first_distilled_rollout_is_shown_even_where_it_comes_late():
    rollouts = batch("go", n=6)
    page = render(rollouts, [None] * 5 + ["go on"], TOKENIZER, rows=2)
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## Rollout 0",
        "## Rollout 1",
        "## Rollout 5",
    ]
    assert "6 rollouts, 6 per prompt; 1 of them are distilled." in page


def test_an_empty_completion_without_score_and_feedback():
    rollouts = Rollouts(prompts=["go"], completions=[""], completion_ids=[[]])
    page = render(rollouts, ["go"], TOKENIZER)
    assert "**Score**: none" in page and "**Feedback**: none" in page
    assert page.count(": yes") == 4


def test_chat_template_arguments_reach_the_template():
    class Recorder:
        def apply_chat_template(self, prompt, **options):
            seen.append(options)
            return "text" if options.get("tokenize") is False else [1]

    seen: list[dict] = []
    render(batch([{"role": "user", "content": "go"}]), [None] * 2, Recorder(), {"enable_thinking": False})
    assert seen and all(options["enable_thinking"] is False and options["add_generation_prompt"] for options in seen)
