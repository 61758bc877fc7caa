import pickle

import pytest
from omegaconf import OmegaConf

from selfdistill.config.secrets import Redactor, is_secret_key, masked_keys
from selfdistill.errors import UserError


@pytest.mark.parametrize(
    "key", ["api_key", "API_KEY", "openai_api_key", "apikey", "password", "hub_token", "token", "client-secret"]
)
def test_secret_keys(key):
    assert is_secret_key(key)


@pytest.mark.parametrize(
    "key", ["prompt_tokens", "max_tokens", "eos_token", "pad_token", "tokenizer", "key", "token_level", "keys"]
)
def test_keys_that_are_no_secrets(key):
    assert not is_secret_key(key)


def test_a_secret_is_masked_wherever_it_appears():
    config = OmegaConf.create(
        {"api_key": "abcdefgh-1", "headers": [{"X": "Bearer ${api_key}"}], "token": None, "password": "???", "n": 3}
    )
    assert Redactor(config).config == {
        "api_key": "***",
        "headers": [{"X": "Bearer ***"}],
        "token": None,
        "password": "???",
        "n": 3,
    }


def test_the_written_configuration_reads_back_the_same():
    config = OmegaConf.create(
        {"template": r"costs \${price} and \\\${x}", "text": "off", "n": 1e-6, "none": None, "l": [1, "2"]}
    )
    resolved = OmegaConf.to_container(config, resolve=True)
    assert resolved["template"].startswith("costs ${price}")
    read = OmegaConf.create(Redactor(config).yaml())
    assert OmegaConf.to_container(read, resolve=True) == resolved


def test_a_secret_from_the_environment_is_written_as_its_variable(monkeypatch):
    monkeypatch.setenv("MY_KEY", "abcdefgh-1")
    config = OmegaConf.create({"api_key": "${oc.env:MY_KEY}", "header": "Bearer ${api_key}"})
    assert Redactor(config).yaml() == "api_key: ${oc.env:MY_KEY}\nheader: Bearer ***\n"


def test_arguments():
    redactor = Redactor(OmegaConf.create({}))
    given = ["train", "teacher.api_key=x", "+logger.password=y", "group@server.token=z", "max_tokens=5", "=a"]
    expected = ["train", "teacher.api_key=***", "+logger.password=***", "group@server.token=***", "max_tokens=5", "=a"]
    assert redactor.arguments(given) == expected


def test_a_password_in_an_address_is_masked_everywhere():
    config = OmegaConf.create({"base_url": "http://me:hunter2hunter2@host:8000/v1", "more": ["https://t0ken@host/v1"]})
    redactor = Redactor(config)
    assert redactor.config == {"base_url": "http://***@host:8000/v1", "more": ["https://***@host/v1"]}
    assert redactor.text("401 with hunter2hunter2 at http://x:y@z") == "401 with *** at http://***@z"
    assert redactor.arguments(["teacher.base_url=http://a:b@c"]) == ["teacher.base_url=http://***@c"]
    assert str(UserError("no answer from http://a:b@c/v1")) == "no answer from http://***@c/v1"


def test_a_password_from_the_environment_is_found_again(monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", "abcdefgh-1")
    written = Redactor(OmegaConf.create({"base_url": "http://me:${oc.env:MY_PASSWORD}@host/v1"})).yaml()
    assert written == "base_url: http://me:${oc.env:MY_PASSWORD}@host/v1\n"
    half = Redactor(OmegaConf.create({"base_url": "http://literal:x${oc.env:MY_PASSWORD}@host/v1"})).yaml()
    assert "abcdefgh" not in half and "literal" not in half


def test_secrets_within_braces_are_masked():
    redactor = Redactor(OmegaConf.create({}))
    given = ["+training.arguments={hub_token: abc, x: 1}", "teacher={api_key:'a b',model:m}"]
    assert redactor.arguments(given) == [
        "+training.arguments={hub_token: ***, x: 1}",
        "teacher={api_key:***,model:m}",
    ]


def test_what_was_masked_is_known():
    config = OmegaConf.create({"a": {"token": "***", "n": 1}, "urls": ["http://h", "http://***@h/v1"], "b": "** *"})
    assert masked_keys(config) == ["a.token", "urls[1]"]


@pytest.mark.parametrize("name", ["hub_token", "push_to_hub_token"])
def test_pickled_arguments_hold_no_token(name, tmp_path):
    from selfdistill.training.arguments import SelfDistillConfig

    arguments = SelfDistillConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, num_generations=1
    )
    setattr(arguments, name, "hf_abcdefghijkl")
    assert b"hf_abcdefghijkl" not in pickle.dumps(arguments)
    assert getattr(arguments, name) == "hf_abcdefghijkl"
    assert pickle.loads(pickle.dumps(arguments)).output_dir == str(tmp_path)
