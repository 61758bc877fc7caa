"""Records of cases as Markdown. Imports nothing heavy."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from experiments.gpu.cases import CASES, OPD, Case

Record = dict[str, Any]
PHASES = ("generate", "reward", "teacher", "update")
HEADS = (
    *("work", "model", "sampler", "trainer", "step s", *(f"{phase} s" for phase in PHASES)),
    *(f"{phase} GiB" for phase in PHASES),
    *("card GiB", "ours / TRL"),
)
# benchmarks/opd-frameworks/REPORT.md of github.com/SemiAnalysisAI/opd-benchmark, on two H100 80 GB.
PUBLISHED = {
    "verl": (229, 8.38, 553.9, 5.05),
    "prime-rl": (276, 6.96, 535.7, 6.79),
    "Miles": (335, 5.73, 392.6, 11.49),
}


def read(file: Path) -> dict[str, Record]:
    """The last record of each case; what a kill left of a line is passed over."""
    records: dict[str, Record] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records[record["case"]] = record
    return records


def state(record: Record | None) -> str:
    """In a few words."""
    if record is None:
        return "to be done"
    return f"failed: {record['error']}" if "error" in record else f"{step_s(record):.2f} s a step"


def _settled(record: Record) -> list[Mapping[str, Any]]:
    """The steps without the first one, which warms up."""
    return record["steps"][1:] or record["steps"]


def step_s(record: Record) -> float:
    """The median of a step, in seconds."""
    return median(sum(phase["seconds"] for phase in step.values()) for step in _settled(record))


def phase_s(record: Record, phase: str) -> float | None:
    """The median of a phase in seconds; None where there is no such phase."""
    values = [step[phase]["seconds"] for step in _settled(record) if phase in step]
    return median(values) if values else None


def peak_gib(record: Record, kind: str, phase: str | None = None) -> float | None:
    """The largest peak of all steps, of one phase or of all.

    Args:
        kind: `peak_gib` or `used_gib`.
    """
    found = [value[kind] for step in record["steps"] for name, value in step.items() if phase is None or name == phase]
    return max(found, default=None)


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def table(records: Iterable[Record]) -> str:
    """One line for each case; in ours the ratio to TRL's time and peak memory, where both were measured."""
    by_name = {record["case"]: record for record in records}
    lines = [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
    for name, case in CASES.items():
        if name in by_name:
            peer = by_name.get(Case(case.work, case.shape, case.sampler, "trl").name)
            lines.append(f"| {' | '.join(_cells(case, by_name[name], peer))} |")
    return "\n".join(lines)


def _cells(case: Case, record: Record, peer: Record | None) -> list[str]:
    head = [case.work, case.shape, case.sampler, case.side]
    if "error" in record:
        error = record["error"].replace("|", "\\|")
        return [*head, f"failed: {error}", *[""] * (len(HEADS) - len(head) - 1)]
    ratio = ""
    if case.side == "ours" and peer is not None and "error" not in peer:
        time, memory = step_s(record) / step_s(peer), _most(record) / max(_most(peer), 1e-9)
        ratio = f"{time:.2f} time, {memory:.2f} memory"
    return [
        *head,
        _number(step_s(record)),
        *(_number(phase_s(record, phase)) for phase in PHASES),
        *(_number(peak_gib(record, "peak_gib", phase), 1) for phase in PHASES),
        _number(peak_gib(record, "used_gib") or None, 1),
        ratio,
    ]


def _most(record: Record) -> float:
    return peak_gib(record, "peak_gib") or 0.0


def opd_table(records: Mapping[str, Record]) -> str:
    """The fifteen updates beside what was published."""
    lines = [
        "| trainer | GPUs | end to end s | trajectories/s | generated tokens/s | steady step s |",
        "|---|" * 1 + "---|" * 5,
    ]
    for name, case in CASES.items():
        record = records.get(name)
        if case.work != OPD or record is None:
            continue
        who = f"{case.side}, {case.sampler}"
        if "error" in record:
            lines.append(f"| {who} | 1 | failed: {record['error']} | | | |")
            continue
        trajectories = len(record["steps"]) * record["completions_per_step"]
        seconds = record["end_to_end_s"]
        per_s = trajectories / seconds
        tokens = per_s * (record["mean_completion_tokens"] or record["completion_tokens"])
        lines.append(
            f"| {who} | 1 | {record['end_to_end_s']:.0f} | {per_s:.2f} | {tokens:.1f} | {step_s(record):.2f} |"
        )
    for who, (seconds, per_s, tokens, step) in PUBLISHED.items():
        lines.append(f"| {who} (published) | 2 × H100 80 GB | {seconds} | {per_s} | {tokens} | {step} |")
    return "\n".join(lines)


def _where(records: Mapping[str, Record]) -> str:
    """Dates, machines and versions of the records."""
    measured = [record for record in records.values() if "error" not in record]
    said = {
        f"{r['date']}: {r['device']}"
        + (f", {r['memory_gib']} GiB, CUDA {r['cuda']}, driver {r['driver']}" if "cuda" in r else "")
        + f", Python {r['python']}, "
        + ", ".join(f"{name} {version}" for name, version in r["versions"].items())
        for r in measured
    }
    return "  \n".join(sorted(said))


def page(real: Mapping[str, Record], tiny: Mapping[str, Record]) -> str:
    """RESULTS.md."""
    parts = ["# Time and memory on a GPU", "Written by `run.py --write`; what stands in the columns is in README.md."]
    if real:
        parts += [_where(real), table(real.values())]
    else:
        parts.append(
            "**Not yet run on a GPU.** None was at hand. What stands below is no measurement of speed: it shows that "
            "every script runs."
        )
    parts += ["## Fifteen updates of 128 trajectories", OPD_SAYS]
    parts.append(opd_table(real))
    if tiny:
        parts += ["## In a tiny size on a CPU: every script runs", TINY_SAYS, _where(tiny), table(tiny.values())]
    return "\n\n".join(parts) + "\n"


OPD_SAYS = (
    "The work of [SemiAnalysisAI/opd-benchmark](https://github.com/SemiAnalysisAI/opd-benchmark) "
    "(benchmarks/opd-frameworks): student and teacher of Qwen3-0.6B's shape, 15 updates, 8 prompts with 16 completions "
    "each, at most 128 tokens, sampled-token reverse KL, full training with AdamW. End to end is from the start of the "
    "process to the end of the last update. The published runs had two H100, trained weights whose answers ended after "
    "about 70 tokens, and their prompts; random weights go on to the limit, so that here more is generated in the same "
    "number of trajectories. TRL's trainer has no sampled-token loss and minimises the whole reverse KL."
)
TINY_SAYS = (
    "`run.py --tiny --one-process`: models of 2 layers and hidden size 64 with 8 completions of at most 6 tokens a "
    "step, in float32, on a machine that did other work as well; memory is that of the whole process. Nothing follows "
    "from these numbers for a GPU."
)
