"""Training and evaluation data written by a served model.

    python -m selfdistill.generate_data model=glm-4.7 base_url=http://localhost:8000/v1 prompts=prompts.jsonl
    python -m selfdistill.generate_data model=glm-4.7 topics=topics.txt train_samples=100 eval_samples=20

Prompts come from a file, or are written by the model itself about topics. Every prompt that gets a response worth keeping
becomes a row {"prompt", "golden_response"}. Started again with the same settings, it continues where it was broken off:
every answer is kept in OUTPUT/answers and none is asked for twice.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from selfdistill.config.options import main, parse, plain, usage
from selfdistill.errors import UserError
from selfdistill.rollout import Message
from selfdistill.teachers.server import probe as server_probe
from selfdistill.teachers.server.client import Client, ServerUnavailable, all_of
from selfdistill.teachers.server.prompt_sources import Candidate, FilePrompts, TopicPrompts
from selfdistill.teachers.server.reply_cache import ReplyCache
from selfdistill.teachers.server.writing import Sampling, Writer, Written, show_golden


@dataclass
class Options:
    """What can be set on the command line."""

    model: str = MISSING
    base_url: Any = "http://localhost:8000/v1"
    prompts: str | None = None
    topics: Any = None
    output: str = "data/generated"
    train_samples: int = 100
    eval_samples: int = 20
    samples: int = 1
    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 1024
    stop: list[str] = field(default_factory=list)
    seed: int = 0
    system: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    show_golden_response: bool = False
    golden_template: str | None = None
    topic_template: str | None = None
    prompts_per_request: int = 10
    keep: Any = None
    keep_at_least: float = 1.0
    trusted_prefixes: list[str] = field(default_factory=list)
    max_concurrency: int = 8
    timeout_s: float = 120.0
    patience_s: float = 300.0
    api_key_env: str = "OPENAI_API_KEY"


EXPLANATIONS = {
    "model": "the name under which the model is served",
    "base_url": "the server, or a list of servers [http://a:8000/v1,http://b:8000/v1]",
    "prompts": "a file of prompts: .jsonl, .json, .csv, .parquet as for training, or .txt with one a line",
    "topics": "instead of prompts: a text file with one topic a line, or a list [cooking,travel]",
    "output": "the folder for train_data.json, eval_data.json and report.json",
    "train_samples": "rows of training data",
    "eval_samples": "rows of evaluation data; no prompt is in both",
    "samples": "responses asked for per prompt; all that are kept go into golden_response",
    "temperature": "of the responses",
    "top_p": "of the responses",
    "max_tokens": "the longest response; one that is cut off there is not kept",
    "stop": "texts at which a response ends",
    "seed": "of the sampling and of the split",
    "system": "a system message for every prompt",
    "chat_template_kwargs": "for the server's chat template, e.g. chat_template_kwargs.enable_thinking=false",
    "show_golden_response": "show the model the golden response of a row that has one",
    "golden_template": "how it is shown, with {prompt} and {demonstration}",
    "topic_template": "how prompts are asked for, with {count} and {topic}",
    "prompts_per_request": "prompts asked for at once",
    "keep": "a reward that decides what is kept, e.g. keep._target_=selfdistill.rewards.ExactMatch",
    "keep_at_least": "the score from which on a response is kept",
    "trusted_prefixes": "packages besides selfdistill from which keep may come",
    "max_concurrency": "requests under way at once",
    "timeout_s": "seconds for one request",
    "patience_s": "seconds for which a failing request is tried again",
    "api_key_env": "the environment variable with the API key",
}


@dataclass
class Row:
    """A prompt with its kept responses."""

    candidate: Candidate
    responses: list[str]

    def as_json(self) -> dict[str, Any]:
        return {**self.candidate.as_json(), "golden_response": self.responses}


class Generation:
    """One run of the command: the rows found so far, and what was rejected."""

    def __init__(self, options: Options, client: Client, cache: ReplyCache, identity: str, keep: Any) -> None:
        self.options = options
        self.client = client
        sampling = Sampling(
            samples=options.samples,
            temperature=options.temperature,
            top_p=options.top_p,
            max_tokens=options.max_tokens,
            stop=tuple(options.stop),
            seed=options.seed,
            chat_template_kwargs=dict(options.chat_template_kwargs),
        )
        self.writer = Writer(
            client,
            options.model,
            sampling,
            cache=cache,
            identity=identity,
            keep=keep,
            keep_at_least=options.keep_at_least,
        )
        self.source = open_source(options, client, cache, identity)
        self.wanted = options.train_samples + options.eval_samples
        self.rows: list[Row] = []
        self.rejected: list[dict[str, str]] = []

    async def run(self, progress: Progress) -> None:
        """Ask for prompts and responses until there are enough, or there are no more prompts."""
        bar = progress.add_task("rows", total=self.wanted)
        while len(self.rows) < self.wanted:
            candidates = await self.source.take(self.wanted - len(self.rows))
            if not candidates:
                break
            done = len(self.rows)

            async def one(candidate: Candidate) -> Written:
                written = await self.writer.write_one(self._messages(candidate), candidate.columns)
                progress.update(bar, completed=min(self.wanted, progress.tasks[bar].completed + bool(written.kept)))
                return written

            for candidate, written in zip(candidates, await all_of(one(c) for c in candidates), strict=True):
                self._judge(candidate, written)
            progress.update(bar, completed=len(self.rows))
            assert len(self.rows) >= done
        self.rejected += self.source.rejected

    def _messages(self, candidate: Candidate) -> list[Message]:
        messages = candidate.messages
        golden = candidate.columns.get("golden_response")
        if self.options.show_golden_response and golden:
            messages = show_golden(messages, golden, self.options.golden_template or _default_golden_template())  # type: ignore[assignment]
        return messages

    def _judge(self, candidate: Candidate, written: Written) -> None:
        responses = list(dict.fromkeys(written.kept))
        for text, reason in written.rejected:
            self.rejected.append({"reason": f"response {reason}", "prompt": candidate.text, "response": text})
        if responses:
            self.rows.append(Row(candidate, responses))
        else:
            self.rejected.append({"reason": "prompt without a response to keep", "prompt": candidate.text})

    def split(self) -> tuple[list[Row], list[Row]]:
        """Training and evaluation rows; which is which depends on seed and prompt alone. Too few rows: in proportion."""
        total = min(len(self.rows), self.wanted)
        evaluation = self.options.eval_samples
        if total < self.wanted:
            evaluation = round(total * self.options.eval_samples / self.wanted)
        rows = self.rows[:total]
        ranked = sorted(
            rows, key=lambda row: hashlib.sha256(f"{self.options.seed}|{row.candidate.key}".encode()).digest()
        )
        chosen = {id(row) for row in ranked[:evaluation]}
        return [row for row in rows if id(row) not in chosen], [row for row in rows if id(row) in chosen]


def open_source(options: Options, client: Client, cache: ReplyCache, identity: str) -> FilePrompts | TopicPrompts:
    """Where prompts come from."""
    if options.prompts is not None:
        return FilePrompts(options.prompts, options.system)
    return TopicPrompts(
        plain(options.topics),
        client,
        options.model,
        cache=cache,
        identity=identity,
        template=options.topic_template,
        per_request=options.prompts_per_request,
        system=options.system,
        sampling=Sampling(
            temperature=max(options.temperature, 0.7),
            max_tokens=max(options.max_tokens, 1024),
            seed=options.seed,
            chat_template_kwargs=dict(options.chat_template_kwargs),
        ),
    )


def _default_golden_template() -> str:
    from selfdistill.teachers.templates import DEMONSTRATION

    return DEMONSTRATION


def check(options: Options) -> None:
    """What can be told before anything is sent.

    Raises:
        UserError: neither prompts nor topics, or both; a number out of range.
    """
    if (options.prompts is None) == (options.topics is None):
        raise UserError("Write either prompts=FILE, or topics=FILE for prompts that the model writes itself.")
    for name in ("samples", "prompts_per_request"):
        if getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)}: must be at least 1.")
    for name in ("train_samples", "eval_samples"):
        if getattr(options, name) < 0:
            raise UserError(f"{name}={getattr(options, name)}: must be at least 0.")
    if options.train_samples + options.eval_samples == 0:
        raise UserError("train_samples=0 and eval_samples=0: there is nothing to generate.")


def build_keep(options: Options) -> Any:
    """The reward that decides what is kept.

    Raises:
        UserError: not a `_target_`, one that is not trusted, or one that cannot be built.
    """
    keep = plain(options.keep)
    if keep is None:
        return None
    if not isinstance(keep, dict) or not isinstance(keep.get("_target_"), str):
        raise UserError("keep is a reward by its path, for example keep._target_=selfdistill.rewards.ExactMatch")
    trusted = ("selfdistill", *options.trusted_prefixes)
    if not any(keep["_target_"].startswith(f"{prefix.rstrip('.')}.") for prefix in trusted):
        package = keep["_target_"].split(".")[0]
        raise UserError(f"keep._target_={keep['_target_']}: to allow it, write trusted_prefixes=[{package}]")
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(keep)
    except InstantiationException as error:
        raise UserError(f"keep: {str(error).strip().splitlines()[0]}") from None


def write_json(path: Path, value: Any) -> None:
    """Write a file as a whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def report(generation: Generation, train: list[Row], evaluation: list[Row], folder: Path) -> Table:
    """The counts as a table; all that was rejected, with reasons, goes to report.json."""
    counts: dict[str, int] = {}
    for item in generation.rejected:
        counts[item["reason"]] = counts.get(item["reason"], 0) + 1
    write_json(
        folder / "report.json",
        {
            "model": generation.options.model,
            "train": len(train),
            "eval": len(evaluation),
            "requests": sum(server.sent for server in generation.client.servers),
            "counts": counts,
            "rejected": generation.rejected,
        },
    )
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("training rows", str(len(train)), str(folder / "train_data.json"))
    table.add_row("evaluation rows", str(len(evaluation)), str(folder / "eval_data.json"))
    for reason, count in sorted(counts.items(), key=lambda pair: -pair[1]):
        table.add_row(f"rejected: {reason}", str(count), str(folder / "report.json"))
    return table


def run(arguments: list[str]) -> int:
    """The command. Exit code 0, or 1 when there were fewer prompts than rows wanted."""
    if any(argument in ("-h", "--help", "help") for argument in arguments):
        print(usage(Options, __doc__ or "", EXPLANATIONS))
        return 0
    options = parse(Options, arguments, open_groups=("keep", "chat_template_kwargs"))
    check(options)
    keep = build_keep(options)
    console = Console(highlight=False, emoji=False)
    folder = Path(options.output)
    with (
        Client(
            plain(options.base_url),
            api_key_env=options.api_key_env,
            max_concurrency=options.max_concurrency,
            timeout_s=float(options.timeout_s),
            patience_s=float(options.patience_s),
        ) as client,
        _columns(console) as progress,
    ):
        served = client.run(server_probe.find_model(client, options.model))
        cache = ReplyCache(folder / "answers")
        generation = Generation(options, client, cache, served.identity, keep)
        try:
            client.run(generation.run(progress))
        except (KeyboardInterrupt, ServerUnavailable):
            progress.stop()
            print(
                f"The answers so far are kept in {cache.file}; the same command continues from there.", file=sys.stderr
            )
            raise
        finally:
            cache.close()
    train, evaluation = generation.split()
    write_json(folder / "train_data.json", [row.as_json() for row in train])
    write_json(folder / "eval_data.json", [row.as_json() for row in evaluation])
    console.print(report(generation, train, evaluation, folder))
    missing = generation.wanted - len(train) - len(evaluation)
    if missing > 0:
        console.print(f"{missing} rows fewer than wanted: {_why(generation.rejected, options)}")
    return int(missing > 0)


def _why(rejected: Iterable[dict[str, str]], options: Options) -> str:
    if options.prompts is not None:
        return f"{options.prompts} has no more prompts. Add some, or look into report.json for what was rejected."
    return "the topics yield no more new prompts. Add topics, or look into report.json for what was rejected."


def _columns(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )


if __name__ == "__main__":
    main(run)
