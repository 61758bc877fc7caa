"""Programs that load an export, each in a process of its own, whose crash leaves the training process alone.

The scripts beside this file run with whatever Python has the program, so that they import nothing of this package: a
request is a line of JSON on their standard input, its answer a line on their standard output.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any

import torch

from selfdistill.models.export import ExportError
from selfdistill.models.export.verify import ANSWER_TOKENS, POSITIONS, AnsweringModel, Scores
from selfdistill.rollout import Prompt


class Program(AnsweringModel):
    """An export, as another program has loaded it. A context: the program ends with it.

    Args:
        script: the worker's name.
        python: the interpreter that has the program.
        settings: what the worker is started with.
        dtype: what the export's weights are called.

    Raises:
        ExportError: the program cannot load the export, or broke down.
    """

    def __init__(
        self,
        script: str,
        settings: Mapping[str, Any],
        *,
        dtype: str,
        python: str = sys.executable,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._dtype, self._script, self._kwargs = dtype, script, dict(chat_template_kwargs or {})
        self._errors = TemporaryFile("w+")  # noqa: SIM115 - closed with the context
        command = [python, str(Path(__file__).parent / f"{script}.py"), json.dumps(dict(settings))]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=None if environment is None else dict(environment),
        )

    def __enter__(self) -> "Program":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    @property
    def dtype(self) -> str:
        return self._dtype

    def ask(self, do: str, **arguments: Any) -> Any:
        """The worker's answer.

        Raises:
            ExportError: it broke down.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._errors.seek(0)
            said = [text for text in self._errors.read().splitlines() if text.strip()] or ["nothing"]
            raise ExportError(f"{self._script} ended with code {self._process.returncode}; it said: {said[-1].strip()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ExportError(f"{self._script}: {answer['error']}")
        return answer["result"]

    def encode(self, prompt: Prompt) -> list[int]:
        return self.ask("encode", prompt=prompt, kwargs=self._kwargs)  # type: ignore[no-any-return]

    def decode(self, ids: list[int]) -> str:
        return str(self.ask("decode", ids=ids))

    def answers(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        return [self.ask("answer", ids=ids, max_new_tokens=ANSWER_TOKENS) for ids in prompt_ids]

    def scores(self, sequences: list[list[int]]) -> Scores:
        found = [self.ask("score", ids=ids, tail=min(POSITIONS, len(ids) - 1)) for ids in sequences]
        logps: Sequence[float | None] = [logp for one in found for logp in one["logps"]]
        likeliest = [token for one in found for token in one["likeliest"]]
        return Scores(torch.tensor([float("nan") if logp is None else logp for logp in logps]), torch.tensor(likeliest))
