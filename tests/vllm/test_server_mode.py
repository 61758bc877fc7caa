"""A trainer whose completions a vLLM server samples: TRL's client against a real server, started as TRL starts one.

TRL sends weights over NCCL, which takes a GPU. Here they go by way of a file that the server reads; all else is as
there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.vllm.conftest import VllmServer
from tests.vllm.test_weights import QUESTIONS, make

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """A server with the settings that TRL's own command gives one, apart from the way of the weights."""
    from trl.scripts.vllm_serve import ScriptArguments, build_command

    command = build_command(ScriptArguments(model="student"))
    imposed = command[command.index("--weight-transfer-config") :]
    assert imposed[::2] == ["--weight-transfer-config", "--logprobs-mode", "--max-logprobs"]
    server = VllmServer(tmp_path_factory.mktemp("sampler") / "log.txt", *imposed, development=True)
    server.start()
    server.wait()
    yield server
    server.kill()


def test_the_server_samples_from_what_was_learnt(
    sampler: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.generation.vllm_client import VLLMClient

    sent: list[int] = []

    def by_file(client: Any, metadata: list, named: Iterator[tuple[str, torch.Tensor]]) -> None:
        weights = {name: weight.detach().clone().contiguous() for name, weight in named}
        assert [name for name, _, _ in metadata] == list(weights)
        save_file(weights, tmp_path / "model.safetensors")
        how = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path)}}
        client._post(f"{client.base_url}/collective_rpc", json=how)
        sent.append(len(weights))

    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", by_file)
    how = {"vllm_mode": "server", "vllm_server_base_url": sampler.url.removesuffix("/v1"), "max_steps": 4}
    trainer = make(tmp_path / "run", QUESTIONS * 16, learning_rate=1e-3, **how)
    assert (
        trainer.vllm_generation.vllm_client.get_server_info()["model_config"]["logprobs_mode"] == "processed_logprobs"
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(sent) == len(lines) == 4
    assert all(line["sampling/sampling_logp_difference/mean"] < 0.01 for line in lines)
    assert all(0.9 < line["sampling/importance_sampling_ratio/mean"] < 1.1 for line in lines)
