"""Small runs of every kind, what came of them, and whether two of them are the same."""

import json
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from tests.fuzz.forks import Trial, forked
from tests.torture import faults

LIMIT_S = 120.0
GRANT = "trusted_prefixes=[tests]"  # a resumed run is granted its reward again
RESUME = "resume=RUN"  # stands for the one run or the other
TIMES = ("time/", "step_time", "eval_runtime", "num_tokens_per_s")
COMMON = [
    "reward=none", "+reward._target_=tests.saboteur.Saboteur", GRANT, "data=jsonl", "logger=none",
    "output_dir=outputs", "max_steps=5", "num_generations=2", "completions_per_step=4", "hardware=cpu",
    "hardware.per_device_batch_size=2", "hardware.threads=1", "rollout.max_completion_tokens=4", "learning_rate=0.003",
    "training.checkpoint_every=2", "training.keep_checkpoints=1",
]  # fmt: skip
# Together they have every kind of file that a run writes: evaluations on the way, shared rollouts, a teacher's weights,
# an adapter, a best checkpoint, exports.
RUNS = {
    "policy gradient, evaluated on the way": [
        "beta=0.04", "eval.every=2", "eval.max_rows=2", "eval.max_new_tokens=4", "eval.max_rows_per_suite=1",
        "export=merged_16bit",
    ],
    "averaged teacher, mixed rollouts": [
        "eval=none", "beta=0", "teacher=demonstration", "teacher/weights=ema", "teacher.weights.cadence=rollout",
        "teacher.weights.rate=0.2", "rollout.on_policy_fraction=0.7", "rollout.cross_entropy_weight=0.5",
        "+training.arguments.steps_per_generation=4", "training.keep_checkpoints=2",
    ],
    "adapter, rollouts used twice": [
        "eval=none", "beta=0.04", "model.tuning=lora", "model.lora.r=4", "training.num_iterations=2",
        "teacher=feedback", "policy_weight=1.0", "export=lora",
    ],
    "monitors that keep the best": [
        "beta=0", "monitors=strict", "eval.every=1", "eval.max_rows=2", "eval.max_new_tokens=4",
        "eval.max_rows_per_suite=1",
    ],
}  # fmt: skip


@cache
def _world() -> Path:
    """A folder with a small model and data, made once."""
    from tests.tiny import tiny_model, tiny_tokenizer

    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [
        {"prompt": f"add {i} {i + 1}", "answer": str(2 * i + 1), "golden_response": f"it is {2 * i + 1}"}
        for i in range(6)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(run: str) -> list[str]:
    """The command line of a run."""
    world = _world()
    paths = [f"model.name={world / 'model'}", f"data.path={world}/rows.jsonl", f"data.eval_path={world}/rows.jsonl"]
    return [*COMMON, *paths, *RUNS[run]]


@cache
def _composed(given: tuple[str, ...]) -> Any:
    """What Hydra makes of a command line; composing takes longer than the small runs do."""
    from hydra import compose, initialize_config_dir

    from selfdistill.config.conf import CONF

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(given), return_hydra_config=True)


def train(given: list[str]) -> None:
    """`python -m selfdistill.train` in this process, from a command line that is composed already."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    from selfdistill import train
    from selfdistill.config import explain, fail
    from selfdistill.errors import UserError

    cfg = _composed(tuple(RESUME if word.startswith("resume=") else word for word in given)).copy()
    cfg.hydra.overrides.task = list(given)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    for word in given:
        if word.startswith("resume="):
            cfg.resume = word.removeprefix("resume=")
    try:
        train.run(cfg)
    except UserError as error:
        raise SystemExit(fail(explain(error))) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def trained(given: list[str], folder: Path, fault: Callable[[Callable[[], None]], None] | None = None) -> Trial:
    """A command in a fork, in a folder, with a fault or without."""
    if any(word.startswith("resume=") for word in given):
        given = [*given, GRANT]
    _composed(tuple(RESUME if word.startswith("resume=") else word for word in given))  # here, for every fork to come
    work = partial(train, given)
    return forked(work if fault is None else partial(fault, work), folder, LIMIT_S)


def fault(folder: Path, number: int, kind: int, name: str = "", log: str = "") -> Callable[[Callable[[], None]], None]:
    """A fault at the `number`-th change below the folder of the runs."""
    below = folder / "outputs"
    return lambda work: faults.with_fault(work, below, number, kind, name, log)


@cache
def unbroken(run: str) -> tuple[Path, list[str]]:
    """A run without any incident, and the changes of files that it made, in their order."""
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    log = folder / "changes.txt"
    trial = trained(arguments(run), folder, fault(folder, 0, faults.COUNT, log=str(log)))
    if trial.code != 0:
        raise RuntimeError(f"{run}: {trial.err}")
    (path,) = runs_in(folder)
    return path, log.read_text().splitlines()


def runs_in(folder: Path) -> list[Path]:
    """The runs that someone who looks into the folder sees."""
    outputs = folder / "outputs"
    return [path for path in outputs.iterdir() if not path.name.startswith(".")] if outputs.is_dir() else []


def summary(run: Path) -> dict[str, Any]:
    """Its summary.json."""
    return json.loads((run / "summary.json").read_text())


def difference(run: Path, reference: Path) -> str:
    """The first thing in which a run's end is not that of another one; empty where there is none."""
    if summary(run)["status"] != "finished":
        return f"status {summary(run)['status']}"
    for name, what in _content(reference).items():
        if _content(run).get(name) != what:
            return f"{name} differs"
    surplus = _content(run).keys() - _content(reference).keys()
    return f"{sorted(surplus)[0]} is left" if surplus else ""


def _content(run: Path) -> dict[str, Any]:
    """What must be the same in two runs, by name."""
    content: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_file() and not name.startswith((".hydra", "bad_rows", ".lock", "error-before")):
            content[name] = path.read_bytes() if path.suffix == ".safetensors" or name == "prompts.md" else "there"
    content["metrics.jsonl"] = [
        {key: value for key, value in json.loads(line).items() if not key.startswith(TIMES)}
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    for name in ("completions.jsonl", "evaluation.jsonl"):
        content[name] = (run / name).read_text() if (run / name).exists() else "none"
    end = summary(run)
    content["summary.json"] = {
        "step": end["step"],
        **{
            when: {name: value for name, value in metrics.items() if not name.startswith(TIMES)}
            for when, metrics in (end.get("eval") or {}).items()
        },
    }
    return content
