"""Differences between student and teacher are said before training, each with what to set."""

import pytest
from transformers import GenerationConfig

from selfdistill.errors import UserError
from selfdistill.teachers import Teacher
from selfdistill.teachers.language import ANSWERED, Speaker, compare_models, ends_alike, own_findings
from selfdistill.teachers.weights import Model
from selfdistill.tokens import PROBE
from tests.families import CHATML, FAMILIES, gemma, qwen, qwen_base
from tests.teachers.server.served import teacher_of
from tests.teachers.server.stub_server import Reply, StubServer
from tests.tiny import tiny_model, tiny_tokenizer


def ids(tokenizer, *tokens):
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def speaker(tokenizer, *ends, conversational=True, **kwargs):
    return Speaker(tokenizer, ids(tokenizer, *ends) or None, kwargs, conversational)


def test_a_model_that_ends_as_its_template_does_has_no_findings():
    assert own_findings(speaker(qwen(), "<|im_end|>")) == []
    assert own_findings(speaker(tiny_tokenizer())) == []
    assert own_findings(speaker(gemma(), "<eos>", "<end_of_turn>")) == []


def test_a_template_that_ends_otherwise_than_the_model_is_said():
    (finding,) = own_findings(speaker(gemma(), "<eos>"))
    assert "'<end_of_turn>'" in finding
    assert "'<eos>'" in finding
    assert "generation_config.json" in finding
    assert own_findings(speaker(gemma(), "<eos>", conversational=False)) == []


def test_a_model_without_any_end_is_said():
    tokenizer = FAMILIES["qwen"].__wrapped__()
    tokenizer.eos_token, tokenizer.chat_template = None, "{{ messages[-1]['content'] }}"
    (finding,) = own_findings(speaker(tokenizer))
    assert "no token that ends an answer" in finding


def test_a_switch_that_the_template_does_not_read_is_said():
    (finding,) = own_findings(speaker(qwen(), enable_thinkng=False))
    assert "model.chat_template_kwargs.enable_thinkng changes nothing" in finding
    for thinks in (True, False):
        assert own_findings(speaker(qwen(), enable_thinking=thinks)) == []


def test_a_teacher_that_thinks_beside_a_student_that_does_not_is_said():
    student = speaker(qwen(), enable_thinking=False)
    assert Teacher().compare(student) == []
    assert Teacher(chat_template_kwargs={"enable_thinking": False}).compare(student) == []
    (finding,) = Teacher(chat_template_kwargs={"enable_thinking": True}).compare(student)
    assert "</think>" in finding
    assert "teacher.chat_template_kwargs" in finding
    raw = speaker(qwen(), conversational=False, enable_thinking=False)
    assert Teacher(chat_template_kwargs={"enable_thinking": True}).compare(raw) == []


def test_no_end_in_common_is_refused():
    student = speaker(qwen_base(), conversational=False)
    with pytest.raises(UserError, match=r"(?s)^teacher.*'<\|endoftext\|>'.*'<\|im_end\|>'.*data.chat_template"):
        ends_alike(student, ids(qwen_base(), "<|im_end|>"), None, "teacher.model=x")
    assert ends_alike(student, ids(qwen_base(), "<|im_end|>", "<|endoftext|>"), None, "teacher.model=x") == []
    assert ends_alike(student, [], None, "teacher.model=x") == []


def test_another_local_model_is_compared_with_its_own_template():
    other = FAMILIES["qwen_base"].__wrapped__()
    other.chat_template = CHATML.replace("<|im_end|>", "<|endoftext|>")
    asked, ends = compare_models(speaker(qwen_base()), other, None, "teacher.weights.name=x")
    assert "'<|endoftext|>" in asked
    assert "data.chat_template=FILE" in asked
    assert "'<|im_end|>'" in ends
    assert "distill/divergence_last" in ends
    assert compare_models(speaker(qwen_base()), qwen_base(), None, "teacher.weights.name=x") == []


def test_a_model_in_memory_tells_its_generation_configuration():
    student, module = speaker(tiny_tokenizer(), "<|end|>"), tiny_model()
    assert Teacher(Model(module)).compare(student) == []
    module.generation_config = GenerationConfig(eos_token_id=7)
    with pytest.raises(UserError, match=r"teacher.weights.name=Qwen3ForCausalLM: the student ends"):
        Teacher(Model(module)).compare(student)


def served(stub, tokenizer, template, eos_token=None):
    stub.encode_chat = lambda messages, **options: tokenizer.apply_chat_template(
        messages, chat_template=template, return_dict=False, **options
    )
    stub.eos_token = eos_token
    return stub


def test_a_served_teacher_is_asked_how_it_writes():
    student = speaker(qwen_base(), enable_thinking=False)
    with served(StubServer(), qwen_base(), CHATML, "<|endoftext|>") as stub:
        assert teacher_of(stub).compare(student) == []
        assert stub.asked("/tokenize")[0].body["chat_template_kwargs"] == {"enable_thinking": False}
        assert teacher_of(stub, mode="write").compare(student) == []
        (finding,) = teacher_of(stub, chat_template_kwargs={"enable_thinking": True}).compare(student)
        assert "teacher.chat_template_kwargs" in finding
    with served(StubServer(), qwen_base(), CHATML.replace("<|im_end|>", "<|im_start|>"), "<|endoftext|>") as stub:
        asked, ends = teacher_of(stub).compare(student)
        assert "the server's own writes otherwise" in asked
        assert "teacher.model=stub" in asked
        assert "distill/divergence_last" in ends


def test_a_served_teacher_without_an_end_in_common_is_refused():
    no_turns = "{{ messages[-1]['content'] }}<|im_start|>"
    with served(StubServer(), qwen(), no_turns, "<|im_start|>") as stub:
        with pytest.raises(UserError, match=r"^teacher.model=stub: the student ends .* '<.im_end.>', the teacher with"):
            teacher_of(stub).compare(speaker(qwen()))
        stub.eos_token = None  # then it may stop at the student's too
        asked, ends = teacher_of(stub).compare(speaker(qwen()))
        assert "distill/divergence_last" in ends


def test_what_a_server_does_not_tell_is_not_compared():
    student = speaker(qwen())
    with StubServer() as stub:
        assert teacher_of(stub).compare(student) == []
        stub.answer = lambda request: Reply(500)
        assert teacher_of(stub, patience_s=0.05).compare(student) == []


def test_the_end_that_a_server_writes_is_found_behind_the_answer():
    text = qwen_base().apply_chat_template(ANSWERED, tokenize=False)
    assert PROBE in text
    assert speaker(qwen_base()).turn_in(qwen_base()(text)["input_ids"]) == ids(qwen_base(), "<|im_end|>")[0]
