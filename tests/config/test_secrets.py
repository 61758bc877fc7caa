import pytest
from omegaconf import OmegaConf

from selfdistill.config.secrets import Redactor, is_secret_key


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
