import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from selfdistill.errors import UserError
from selfdistill.teachers.templating import Template, cut
from tests.tiny import tiny_tokenizer


def template(source: str, **options) -> Template:
    return Template(source, key="teacher.context.template", slots=("prompt", "answer"), **options)


def test_doubled_braces_are_literal():
    assert template('{prompt} {{"a": {answer}}}').fill(prompt="{q}", answer="{1}") == '{q} {"a": {1}}'


@pytest.mark.parametrize("name", ["mine.txt", "mine.md", "mine.jinja", "other.file"])
@pytest.mark.parametrize("ending", ["", "\n"])
def test_a_file(tmp_path, monkeypatch, name, ending):
    (tmp_path / name).write_text("{prompt}\n – {answer}" + ending, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    sources = [f"file:{name}", f"file:{tmp_path / name}"] + ([] if name == "other.file" else [name])
    for source in sources:
        assert template(source).fill(prompt="q", answer="a") == "q\n – a"


def test_a_text_that_ends_like_a_file_is_a_text():
    assert template("{prompt}{answer} see notes.md").fill(prompt="q", answer="a") == "qa see notes.md"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{prompt}", r"teacher\.context\.template: the template lacks \{answer\}"),
        ("nothing", r"lacks \{prompt\}, \{answer\}.*If 'nothing' is a file, write file: in front"),
        ("{{prompt}} {answer}", r"lacks \{prompt\}"),
        ("{prompt}{anwser}", r"\{anwser\} is not a slot of this template, .*; did you mean \{answer\}\?"),
        ("{prompt}{answer:>9}", "Write a slot as it stands here"),
        ("{prompt!r}{answer}", "Write a slot as it stands here"),
        ("{prompt}{answer}{}", r"\{\} is not a slot"),
        ('{prompt}{answer} {"a": 1}', "a literal brace twice"),
        ("{prompt}{answer} }", "a literal brace is written twice"),
        ("{prompt}{answer} {", "a literal brace is written twice"),
        ("missing.txt", r"teacher\.context\.template: cannot read the template file .*missing\.txt: No such file"),
        ("file:", "cannot read the template file"),
    ],
)
def test_what_is_wrong_with_a_template(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        template(source)


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="it is not UTF-8"):
        template(str(path))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with few merges: characters outside ASCII take several tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteDecoder()
    alphabet = ByteLevel.alphabet()
    words = ["the cat sat on the mat", "then there was the hat"]
    tokenizer.train_from_iterator(words, BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES = byte_tokenizer()


class WithoutOffsets(PreTrainedTokenizerFast):
    """A tokenizer that cannot say where its tokens stand in the text."""

    is_fast = False

    def __init__(self):
        super().__init__(tokenizer_object=BYTES.backend_tokenizer)


@pytest.mark.parametrize("tokenizer", [BYTES, WithoutOffsets()], ids=["offsets", "decoding"])
@given(text=st.text(alphabet="the cat's\n日本語é🙂 ", max_size=40), budget=st.integers(1, 40))
def test_a_cut_keeps_a_beginning_within_the_budget(tokenizer, text, budget):
    def count(s):
        return len(BYTES(s, add_special_tokens=False)["input_ids"])

    shown = cut(text, budget, tokenizer)
    if count(text) <= budget:
        assert shown == text
    else:
        beginning = shown.removesuffix("…").removesuffix(" ")
        assert shown.endswith("…")
        assert text.startswith(beginning)
        assert count(shown) <= budget or shown == "…"


def test_a_cut_falls_between_tokens():
    text = "the cat sat on the mat"
    ids = BYTES(text)["input_ids"]
    mark = len(BYTES(" …")["input_ids"])
    for budget in range(mark + 1, len(ids)):
        assert cut(text, budget, BYTES) == BYTES.decode(ids[: budget - mark]).rstrip() + " …"


def test_without_offsets_the_cut_is_the_same():
    text = "the 日本語 🙂 cat's hat é"
    for budget in range(1, 40):
        assert cut(text, budget, WithoutOffsets()) == cut(text, budget, BYTES)


def test_megabytes_are_cut_before_they_are_tokenised():
    tokenised = []

    class Counting(PreTrainedTokenizerFast):
        def __call__(self, text, **options):
            tokenised.extend([text] if isinstance(text, str) else text)
            return super().__call__(text, **options)

    text = "the cat sat on the mat " * 400_000
    counting = Counting(tokenizer_object=BYTES.backend_tokenizer)
    assert cut(text, 100, counting) == cut(text[:5000], 100, BYTES)
    assert sum(map(len, tokenised)) < 50_000


def test_spelled_control_tokens_count_as_the_text_that_they_are():
    tokenizer = tiny_tokenizer()
    assert cut("<|end|>" * 50, 22, tokenizer) == "<|end|>" * 2 + "<|end| …"
    assert cut("<|end|>" * 3, 21, tokenizer) == "<|end|>" * 3


def test_half_a_character_is_cut_like_a_whole_one():
    assert cut("a\ud83d b", None, BYTES) == "a� b"
    assert cut("a\ud83d b" * 50, 10, BYTES) == cut("a� b" * 50, 10, BYTES)


def test_no_budget_and_enough_budget_leave_the_text():
    assert cut("x" * 99, None, tiny_tokenizer()) == "x" * 99
    assert cut("x" * 99, 99, tiny_tokenizer()) == "x" * 99
    assert cut("x" * 99, 1, tiny_tokenizer()) == "…"
    assert cut("x" * 99, 3, tiny_tokenizer()) == "x …"
