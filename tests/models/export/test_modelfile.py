"""The Modelfile's template writes what the chat template writes, and where it cannot, it says so."""

import copy
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from selfdistill.models.export.modelfile import modelfile, read_modelfile, render_go, turns_of, with_default
from selfdistill.models.export.verify import TransformersModel
from selfdistill.rollout import Message
from tests.tiny import tiny_model, tiny_tokenizer

TURN = "'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'"
ASKING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}{{ " + TURN + " }}{% endfor %}" + ASKING
DEFAULT = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
GEMMA = (
    "{{ bos_token }}{% set first = '' %}{% set rest = messages %}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}{% endif %}"
    "{% for m in rest %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
THINKING = CHATML.replace("assistant\n'", "assistant\n' + ('' if enable_thinking else '<think>\n\n</think>\n\n')")
EXPRESSIBLE = {
    "embedded": tiny_tokenizer().chat_template,
    "chatml": CHATML,
    "default system": DEFAULT + CHATML,
    "system in the user's turn": GEMMA,
    "no system": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}" + CHATML,
    "thinking off": THINKING,
}
TOO_MUCH = {
    "numbered": "{% for m in messages %}{{ loop.index ~ m['role'] + m['content'] }}{% endfor %}",
    "changed": "{% for m in messages %}{{ m['role'] + m['content'] | upper }}{% endfor %}",
    "braces": CHATML.replace("<|im_end|>", "{{ '}}' }}<|im_end|>"),
    "last turn": "{% for m in messages %}{{ m['content'] ~ ('!' if loop.last else '.') }}{% endfor %}",
}
CHATS: list[list[Message]] = [
    [{"role": "user", "content": "one {{ two }}"}],
    [{"role": "system", "content": "be\nshort"}, {"role": "user", "content": "one"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": 'three "four"'},
    ],
]


def asked(template: str | None) -> TransformersModel:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    tokenizer.bos_token = "<|pad|>"
    return TransformersModel(tiny_model(), tokenizer, {"enable_thinking": False})


def prompts(trained: TransformersModel, chats: list[list[Message]]) -> list[str]:
    kwargs = dict(trained.chat_template_kwargs)
    render = trained.tokenizer.apply_chat_template
    return [str(render(chat, tokenize=False, add_generation_prompt=True, **kwargs)) for chat in chats]


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_the_modelfiles_prompt_is_the_chat_templates_token_for_token(name: str) -> None:
    trained = asked(EXPRESSIBLE[name])
    text, notes = modelfile(trained, "model.gguf")
    assert text.startswith("FROM ./model.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "<|end|>"' in text
    template, system = read_modelfile(text)
    assert template is not None
    chats = [chat for chat in CHATS if name != "no system" or chat[0]["role"] != "system"]
    for chat, expected in zip(chats, prompts(trained, chats), strict=True):
        found = render_go(template, with_default(chat, system))
        assert found == expected
        assert trained.tokenizer(found).input_ids == trained.tokenizer(expected).input_ids
    assert (notes == []) == (name != "no system")
    assert system == ("You help." if name == "default system" else None)


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_cannot_be_said_is_left_to_the_files_own_template(name: str) -> None:
    text, notes = modelfile(asked(TOO_MUCH[name]), "model.gguf")
    assert "TEMPLATE" not in text
    assert "cannot be said in Ollama's language" in notes[0]


def test_a_model_without_a_chat_template_has_none_in_the_modelfile() -> None:
    assert turns_of(asked(None)) is None
    assert modelfile(asked(None), "model.gguf") == ('FROM ./model.gguf\nPARAMETER stop "<|end|>"\n', [])


def test_other_constructs_of_go_are_not_guessed_at() -> None:
    with pytest.raises(ValueError, match=r"len \.Messages is no construct"):
        render_go("{{ len .Messages }}{{ end }}", CHATS[0])
    with pytest.raises(ValueError, match=r"\.Role is no construct"):
        render_go("{{ range .Messages }}{{ .Role }}{{ end }}", CHATS[0])


GO = """
package main

import ("encoding/json"; "os"; "text/template")

func main() {
	var jobs []struct { Template string; Messages []struct { Role, Content string } }
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil { panic(err) }
	for _, job := range jobs {
		template.Must(template.New("it").Parse(job.Template)).Execute(os.Stdout, job)
		os.Stdout.WriteString("\\x00")
	}
}
"""


@pytest.mark.long
def test_go_itself_renders_the_templates_alike(tmp_path: Path) -> None:
    go = shutil.which("go")
    if go is None:
        pytest.skip("NO go HERE: the templates were compared with our own renderer only (apt install golang-go)")
    (tmp_path / "main.go").write_text(GO)
    jobs, expected = [], []
    for template in EXPRESSIBLE.values():
        trained = asked(template)
        written, system = read_modelfile(modelfile(trained, "model.gguf")[0])
        chats = [chat for chat in CHATS if template != EXPRESSIBLE["no system"] or chat[0]["role"] != "system"]
        jobs += [{"Template": written, "Messages": with_default(chat, system)} for chat in chats]
        expected += prompts(trained, chats)
    environment = {"GOCACHE": str(tmp_path), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "GO111MODULE": "off"}
    done = subprocess.run(
        [go, "run", str(tmp_path / "main.go")],
        input=json.dumps(jobs),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\x00")[:-1] == expected
