"""Training and evaluation data that a served model writes: prompts, responses worth keeping, and a report."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from selfdistill.errors import UserError
from selfdistill.files import write_atomically
from selfdistill.rollout import Message
from selfdistill.teachers.server.client import Client, ServerUnavailable, all_of
from selfdistill.teachers.server.probe import find_model
from selfdistill.teachers.server.prompt_sources import Candidate, FilePrompts, PromptSource, TopicPrompts
from selfdistill.teachers.server.reply_cache import ReplyCache
from selfdistill.teachers.server.writing import Sampling, Writer, Written, show_golden
from selfdistill.teachers.templates import DEMONSTRATION


@dataclass(frozen=True)
class DatasetSettings:
    """What data is written, by which model and how; the keys of conf/generate_data.yaml, which explains them.

    Raises:
        UserError: neither prompts nor topics, or both; a number out of range; a `keep` that is no `_target_`.
    """

    model: str
    base_url: Any  # a text or a list of texts, which OmegaConf cannot express
    prompts: str | None
    topics: Any  # likewise, or None
    output: str
    train_samples: int
    eval_samples: int
    samples: int
    temperature: float
    top_p: float
    max_tokens: int
    stop: list[str]
    seed: int
    system: str | None
    chat_template_kwargs: dict[str, Any]
    show_golden_response: bool
    golden_template: str | None
    topic_template: str | None
    prompts_per_request: int
    keep: Any  # None, or a mapping with `_target_`
    keep_at_least: float
    trusted_prefixes: list[str]
    max_concurrency: int
    timeout_s: float
    patience_s: float
    api_key_env: str

    def __post_init__(self) -> None:
        if (self.prompts is None) == (self.topics is None):
            raise UserError("Write either prompts=FILE, or topics=FILE for prompts that the model writes itself.")
        least = {"samples": 1, "prompts_per_request": 1, "train_samples": 0, "eval_samples": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise UserError(f"{name}={getattr(self, name)}: must be at least {lowest}.")
        if self.rows == 0:
            raise UserError("train_samples=0 and eval_samples=0: there is nothing to generate.")
        if self.keep is not None and not (isinstance(self.keep, dict) and "_target_" in self.keep):
            raise UserError("keep is a reward by its path, for example +keep._target_=selfdistill.rewards.ExactMatch")

    @property
    def rows(self) -> int:
        """Rows wanted, of training and evaluation data together."""
        return self.train_samples + self.eval_samples

    def sampling(self) -> Sampling:
        """How responses are sampled."""
        return Sampling(**{field.name: getattr(self, field.name) for field in fields(Sampling)})

    def source(self) -> PromptSource:
        """Where prompts come from; files are read here."""
        if self.prompts is not None:
            return FilePrompts(self.prompts, self.system)
        return TopicPrompts(self.topics, self.topic_template, self.prompts_per_request, self.system)

    def prompt_sampling(self) -> Sampling:
        """How prompts about topics are sampled: long and varied enough whatever the responses are."""
        longest = max(self.max_tokens, 1024)
        temperature = max(self.temperature, 0.7)
        return replace(self.sampling(), samples=1, temperature=temperature, top_p=1.0, max_tokens=longest, stop=())


class Generation:
    """The rows found so far, and what was rejected."""

    def __init__(self, settings: DatasetSettings, writer: Writer, source: PromptSource) -> None:
        self.settings, self.writer, self.source = settings, writer, source
        source.written_by(replace(writer, sampling=settings.prompt_sampling(), keep=None))
        self.rows: list[Candidate] = []
        self.rejected: list[dict[str, str]] = []

    async def run(self, progress: Progress) -> None:
        """Ask for prompts and responses until there are enough rows, or no more prompts."""
        wanted = self.settings.rows
        bar = progress.add_task("rows", total=wanted)
        while len(self.rows) < wanted:
            candidates = await self.source.take(wanted - len(self.rows))
            if not candidates:
                break

            async def one(candidate: Candidate) -> Written:
                written = await self.writer.write_one(self._messages(candidate), candidate.columns)
                progress.update(bar, completed=min(wanted, progress.tasks[bar].completed + bool(written.kept)))
                return written

            for candidate, written in zip(candidates, await all_of(one(c) for c in candidates), strict=True):
                self._judge(candidate, written)
            progress.update(bar, completed=len(self.rows))
        self.rejected += self.source.rejected

    def _messages(self, candidate: Candidate) -> list[Message]:
        golden = candidate.columns.get("golden_response")
        if not (self.settings.show_golden_response and golden):
            return candidate.messages
        return show_golden(candidate.messages, golden, self.settings.golden_template or DEMONSTRATION)  # type: ignore[return-value]

    def _judge(self, candidate: Candidate, written: Written) -> None:
        candidate.responses = list(dict.fromkeys(written.kept))
        for text, reason in written.rejected:
            self.rejected.append({"reason": f"response {reason}", "prompt": candidate.text, "response": text})
        if candidate.responses:
            self.rows.append(candidate)
        else:
            self.rejected.append({"reason": "prompt without a response to keep", "prompt": candidate.text})

    def split(self) -> dict[str, list[Candidate]]:
        """Training and evaluation rows, shared in proportion if too few; seed and prompt decide which is which."""
        settings = self.settings
        rows = self.rows[: settings.rows]
        evaluation = round(len(rows) * settings.eval_samples / settings.rows)
        ranked = sorted(rows, key=lambda row: hashlib.sha256(f"{settings.seed}|{row.key}".encode()).digest())
        chosen = {id(row) for row in ranked[:evaluation]}
        return {
            "train": [row for row in rows if id(row) not in chosen],
            "eval": [row for row in rows if id(row) in chosen],
        }


def generate(settings: DatasetSettings, keep: Callable[..., Any] | None = None) -> int:
    """Write train_data.json, eval_data.json and report.json to `settings.output`.

    Started again with the same settings, it continues: every answer is kept in OUTPUT/answers.

    Args:
        keep: a reward that decides which responses are kept.

    Returns:
        How many rows fewer than wanted there are.

    Raises:
        UserError: the prompts or the server cannot be used.
    """
    console, folder = Console(highlight=False, emoji=False), Path(settings.output)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Client(
            settings.base_url,
            api_key_env=settings.api_key_env,
            max_concurrency=settings.max_concurrency,
            timeout_s=settings.timeout_s,
            patience_s=settings.patience_s,
        ) as client,
        Progress(*columns, console=console) as progress,
    ):
        asked = settings.source()  # a file that is not there is said before a server is waited for
        with replace(client, patience_s=client.start_patience_s) as first:
            served = first.run(find_model(first, settings.model))
        cache = ReplyCache(folder / "answers")
        writer = Writer(
            client, settings.model, settings.sampling(), cache, served.identity, keep, settings.keep_at_least
        )
        generation = Generation(settings, writer, asked)
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
    rows = generation.split()
    for name, part in rows.items():
        _write_json(folder / f"{name}_data.json", [row.as_json() for row in part])
    console.print(_report(generation, len(rows["train"]), len(rows["eval"]), folder))
    missing = settings.rows - sum(map(len, rows.values()))
    if missing:
        source, more = (f"{settings.prompts} has", "some") if settings.prompts else ("the topics yield", "topics")
        console.print(
            f"{missing} rows fewer than wanted: {source} no more new prompts. "
            f"Add {more}, or look into report.json for what was rejected."
        )
    return missing


def _report(generation: Generation, train: int, evaluation: int, folder: Path) -> Table:
    """The counts as a table; all that was rejected, with reasons, goes to report.json."""
    counts = Counter(item["reason"] for item in generation.rejected)
    report = {
        "model": generation.settings.model,
        "train": train,
        "eval": evaluation,
        "requests": sum(server.sent for server in generation.writer.client.servers),
        "counts": counts,
        "rejected": generation.rejected,
    }
    _write_json(folder / "report.json", report)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("training rows", str(train), str(folder / "train_data.json"))
    table.add_row("evaluation rows", str(evaluation), str(folder / "eval_data.json"))
    for reason, count in counts.most_common():
        table.add_row(f"rejected: {reason}", str(count), str(folder / "report.json"))
    return table


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")
