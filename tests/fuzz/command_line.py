"""Wrong and odd command lines: each either runs, or is refused by one short message, and leaves nothing behind.

python -m tests.fuzz.command_line [COUNT] [SEED]
"""

import random
import sys
from collections.abc import Callable, Iterator

from omegaconf import DictConfig, OmegaConf

from tests.command import composed, groups, options
from tests.fuzz.forks import Row, Trial, counted, empty_folder, forked, prepare, table

COUNT, SEED = 930, 0
LIMIT_S = 180.0
LONGEST_LINE = 4100  # of a message, its prefix included
# Small and quick, for what is not refused and trains.
FAST = ("debug=fast", "eval=none", "logger=none", "hardware=cpu", "completions_per_step=8")
TRAINED = 0.14  # the share of lines that is not stopped by --check

VALUES = (
    "5", "-1", "0", "1.5", "-0.0", "1e400", "nan", "inf", "true", "false", "null", "None", "~", "", " ", "''", '""',
    "[]", "[[1]]", "[1,2]", "[a,b]", "{}", "{a: 1}", "{a: {b: [1]}}", "{_target_: os.system}", "(1)", "*", "?", "???",
    "${seed}", "${missing}", "${oc.env:NO_SUCH_VARIABLE}", "${oc.env:HOME}", "${hydra:job.name}", "${", "}", "a b",
    "ä", "日本", "🙂", "a=b", "=5", "==", "'", '"', "\\", "\\n", "a\tb", "../..", "/dev/null", "/proc/x", ".", "~/x",
    "os.system", "selfdistill", "selfdistill.rewards", "torch.Tensor", "embedded", "embedded:far_train", "@", "a@b",
    "glob(*)", "choice(1,2)", "range(1,3)", "interval(0,1)", "shuffle(1,2)", "int(3)", "str(3)", "9" * 400,
    "x" * 100_000, "a " * 3_000, "10000", "100000", "99999999999999999999", "0x10", "1_000", "2026-11-21",
    "http://u:p@h:1/v1",
)  # fmt: skip
FLAGS = (
    "--check", "--multirun", "-m", "--cfg", "--cfg job", "--cfg hydra", "--cfg all", "--resolve", "--info",
    "--info all", "--info searchpath", "--info defaults", "--info defaults-tree",
    "--info config", "--info plugins", "--package x",
    "-p model", "--config-name", "--config-name nothing", "--config-name train.yaml", "--config-path x",
    "--config-dir x", "--config-dir /", "-cd x", "-cn x", "-cp x",
    "--version", "--hydra-help", "-sc",
    "--shell-completion", "-sc install=bash", "-sc query=bash", "-sc install=nothing", "--run",
    "--experimental-rerun x", "--unknown", "-x",
    "-", "--", "---", "--check=1", "--multirun=2", "check", "true", "5", "=", "+", "~", "@", ":", "a:b=c",
    "model@x=tiny",
)  # fmt: skip
HYDRA = (
    "hydra.run.dir", "hydra.output_subdir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.mode", "hydra.searchpath",
    "hydra.job.name", "hydra.job.chdir", "hydra.job.num", "hydra.verbose", "hydra/launcher", "hydra/sweeper",
    "hydra/job_logging", "hydra/callbacks", "hydra.callbacks", "hydra.launcher._target_", "hydra.sweeper.params",
    "hydra.job.env_set", "hydra", "hydra.callbacks.check_sweep", "hydra.callbacks.check_sweep._target_",
)  # fmt: skip
SIGNS = ("", "", "", "", "+", "++", "~")


def keys_of(cfg: DictConfig) -> list[str]:
    """Every key of a configuration, groups and leaves."""

    def walk(value: object, path: str) -> Iterator[str]:
        if path:
            yield path
        if isinstance(value, dict):
            for key, item in value.items():
                yield from walk(item, f"{path}.{key}" if path else str(key))

    return list(walk(OmegaConf.to_container(cfg, resolve=False), ""))


def mutations(count: int, seed: int) -> Iterator[tuple[str, list[str]]]:
    """Kinds of mistakes and command lines that make them."""
    draw = random.Random(seed)
    keys, all_groups = keys_of(composed(["experiment=hybrid", "model.tuning=lora"])), groups()
    chosen = [f"{group}={option}" for group in all_groups for option in options(group)]

    def misspelt(word: str) -> str:
        at = draw.randrange(len(word))
        return draw.choice(
            (word[:at] + word[at + 1 :], word[:at] + draw.choice("abz_.-é0") + word[at:], word + word[at])
        )

    kinds: dict[str, Callable[[], list[str]]] = {
        "a value of another kind": lambda: [f"{draw.choice(keys)}={draw.choice(VALUES)}"],
        "a sign before the key": lambda: [f"{draw.choice(SIGNS)}{draw.choice(keys)}={draw.choice(VALUES)}"],
        "a key misspelt": lambda: [f"{draw.choice(SIGNS)}{misspelt(draw.choice(keys))}={draw.choice(VALUES)}"],
        "a group with an odd option": lambda: [f"{draw.choice(SIGNS)}{draw.choice(all_groups)}={draw.choice(VALUES)}"],
        "an option misspelt": lambda: [misspelt(draw.choice(chosen))],
        "two odd keys": lambda: [f"{draw.choice(keys)}={draw.choice(VALUES)}" for _ in range(2)],
        "options that may not fit": lambda: draw.sample(chosen, 2),
        "hydra's own keys": lambda: [f"{draw.choice(SIGNS)}{draw.choice(HYDRA)}={draw.choice(VALUES)}"],
        "flags": lambda: [*draw.choice(FLAGS).split(), *draw.sample(chosen, draw.randrange(2))],
        "a sweep": lambda: ["--multirun", f"{draw.choice(keys)}={draw.choice(VALUES)},{draw.choice(VALUES)}"],
        "no key at all": lambda: [draw.choice(VALUES)],
    }
    for index in range(count):
        kind = list(kinds)[index % len(kinds)]
        yield kind, kinds[kind]()


def judged(line: list[str], trial: Trial, checked: bool) -> tuple[str, str]:
    """The outcome in a word, and what is wrong with it, if anything."""
    shown = " ".join(argument if len(argument) < 80 else f"{argument[:60]}…({len(argument)})" for argument in line)
    if trial.code is None:
        return "not done in time", f"`{shown}`: not done in {LIMIT_S:.0f} s"
    if "Traceback" in trial.err or "Traceback" in trial.out:
        last = (trial.err.strip() or trial.out.strip()).splitlines()[-1]
        return "traceback", f"`{shown}`: {last[:200]}"
    if trial.code == 0:
        if checked and trial.left:
            return "left something", f"`{shown}`: checked, and left {sorted(trial.left)[:3]}"
        return "ran", ""
    lines = trial.err.strip().splitlines()
    if trial.code == 1 and "--multirun" in line and all(text.startswith("selfdistill: job") for text in lines):
        return "refused", ""  # job by job
    if trial.code != 2 or not lines:
        return f"exit code {trial.code}", f"`{shown}`: exit code {trial.code}: {trial.err.strip()[-200:]}"
    if len(lines) > 1 or not lines[0].startswith("selfdistill: "):
        return "no one line", f"`{shown}`: {len(lines)} lines: {trial.err[:200]!r}"
    if len(lines[0]) > LONGEST_LINE:
        return "too long", f"`{shown}`: a message of {len(lines[0])} characters"
    if trial.left:
        return "left something", f"`{shown}`: refused, and left {sorted(trial.left)[:3]}"
    return "refused", ""


def attempt(line: list[str], checked: bool) -> Trial:
    from selfdistill import train

    def work() -> None:
        sys.argv = ["selfdistill", *line, *(["--check"] if checked else FAST)]
        train.main()

    with empty_folder() as folder:
        return forked(work, folder, LIMIT_S)


def rows(count: int = COUNT, seed: int = SEED) -> list[Row]:
    """What came of so many command lines; the same ones for the same seed."""
    prepare()
    draw, outcomes = random.Random(seed + 1), dict[str, list[tuple[str, str]]]()
    for kind, line in mutations(count, seed):
        checked = draw.random() >= TRAINED
        outcomes.setdefault(kind, []).append(judged(line, attempt(line, checked), checked))
    return [counted(f"command line: {kind}", found) for kind, found in outcomes.items()]


if __name__ == "__main__":
    print(table(rows(*map(int, sys.argv[1:]))))
