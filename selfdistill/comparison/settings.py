"""Which runs are repetitions of one setting, which keys set settings apart, and what may be compared with what."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import orjson
import pandas as pd

from selfdistill.comparison.reading import COMPLETE, RunSet
from selfdistill.config.suggestions import closest
from selfdistill.errors import UserError

# Keys that say how a run is named, kept and shown, and change nothing that it measures.
WITHOUT_EFFECT: tuple[str, ...] = ("name", "group", "tags", "output_dir", "resume", "check", "repeat", "job_type")
WITHOUT_EFFECT += ("trusted_prefixes", "allow_code_execution", "logger", "export", "eval.every", "eval.batch_size")
WITHOUT_EFFECT += ("training.checkpoint_every", "training.keep_checkpoints", "training.logging_steps")
# Runs that differ in one of these answer different questions: other data, evaluation, model or budget.
CONDITIONS: dict[str, tuple[str, ...]] = {
    "data": ("data", "tasks"),
    "evaluation": ("eval", "probes"),
    "model": (
        "model",
        "model.name",
        "model.revision",
        "model.adapter_path",
        "model.load_in_4bit",
        "model.fingerprint",
    ),
    "budget": ("max_steps", "epochs", "budget_s", "budget_tokens", "completions_per_step", "dry_run"),
}
# Of what stood in the files, where a run's provenance has it: keys that are not in its configuration.
FINGERPRINTS = {"data": "data.fingerprint", "model": "model.fingerprint"}
ABSENT = "–"

Unit = tuple[tuple[str, ...], Any]


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but the seed and the keys that are averaged over.

    Attributes:
        values: the keys that set it apart from the other settings, as text.
        runs: of each unit, that is the values of the keys averaged over and the seed, the run's folder.
    """

    values: dict[str, str]
    runs: dict[Unit, str]

    @property
    def label(self) -> str:
        return label(self.values)

    @property
    def seeds(self) -> list[Any]:
        return sorted({seed for _, seed in self.runs}, key=str)


@dataclass(frozen=True)
class Field:
    """Settings that may be compared: they share data, evaluation, model and budget.

    Attributes:
        conditions: what sets this field apart from others, as text; empty where there is only one.
        knobs: the keys that differ between its settings; `by` where that was given.
        over: the differing keys that are averaged over.
        settings: in the order in which their first runs started.
        missing: of each setting, the units that others have and it has not, and why.
    """

    conditions: dict[str, str]
    knobs: list[str]
    over: list[str]
    settings: list[Setting]
    missing: list[dict[str, Any]]

    @property
    def runs(self) -> list[str]:
        return [run for setting in self.settings for run in setting.runs.values()]


@dataclass(frozen=True)
class Sorted:
    """Runs sorted into fields and settings.

    Attributes:
        fields: the largest first.
        knobs: all keys that differ between the runs, as few as tell them apart.
        shown: their values as text, one row a run.
        left_out: runs that are in no setting: `run`, `why`.
    """

    fields: list[Field]
    knobs: list[str]
    shown: pd.DataFrame
    left_out: list[dict[str, str]]


def label(values: Mapping[str, str]) -> str:
    """`alpha=0.5 beta=0`, or a word where nothing differs."""
    return " ".join(f"{key}={value}" for key, value in values.items()) or "all runs"


def sort_runs(found: RunSet, metric: str, by: Sequence[str] = (), force: bool = False) -> Sorted:
    """Sort runs into fields that may be compared, and into settings.

    Args:
        metric: the metric that a run must have to count.
        by: keys that make a setting; the other differing keys are averaged over. All of them by default.
        force: compare also runs with other data, evaluation, model or budget.

    Raises:
        UserError: `by` names a key that does not differ.
    """
    # A job that was refused has no configuration but what was written on its command line.
    whole = found.runs.index[found.runs["started"].notna()]
    texts = _texts(found)
    written = [key for key in found.chosen if key in texts and found.configs[key].dropna().map(shown).nunique() > 1]
    differing = dict.fromkeys([*written, *(str(key) for key in texts if texts.loc[whole, key].nunique() > 1)])
    texts = texts.loc[whole]
    causes = [key for key in differing if not _follows_seed(key, found.configs.loc[whole])]
    for key in by:
        if not any(_below(cause, key) for cause in causes):
            known = [one for one in found.chosen if one in causes] or causes
            raise UserError(f"by={key}: the runs do not differ in it; {closest(key, known)}")
    chosen = [key for key in found.chosen if key in causes]
    prints = tuple(FINGERPRINTS.values())
    others = sorted(set(causes) - set(chosen), key=lambda key: (key in prints, key.count("."), len(key), key))
    named = [cause for key in by for cause in [*chosen, *others] if _below(cause, key)]
    knobs = _telling([*named, *chosen, *others], texts, always=[key for key in [*named, *chosen] if key not in prints])

    complete, left_out = _complete(found, metric)
    told = [] if force else [key for key in causes if _condition(key) and not _below_any(key, by)]
    told = [key for key in told if key not in prints or not _follows(key, named, texts.loc[complete])]
    fields = []
    for _, group in texts.loc[complete].groupby(told, sort=False) if told else [("", texts.loc[complete])]:
        conditions = _telling([key for key in [*chosen, *others] if key in told], texts.loc[complete], always=[])
        rest = [knob for knob in knobs if knob not in told]
        settings, repeated = _settings(group, found, rest, by)
        left_out += repeated
        varying = [knob for knob in rest if texts.loc[group.index, knob].nunique() > 1]
        wanted = [knob for knob in varying if not by or any(_below(knob, key) for key in by)]
        fields.append(
            Field(
                {key: shown(found.configs.loc[group.index[0]].get(key)) for key in conditions},
                wanted,
                [knob for knob in varying if knob not in wanted],
                settings,
                [],
            )
        )
    fields.sort(key=lambda field: -len(field.runs))
    table = pd.DataFrame(
        {key: [shown(value) for value in found.configs[key]] for key in knobs}, index=found.configs.index
    )
    for field in fields:
        field.missing.extend(_missing(field, found, left_out))
    return Sorted(fields, knobs, table, left_out)


def shown(value: Any) -> str:
    """A value of the configuration as short text; numbers without a tail of digits."""
    if value is None or (isinstance(value, float) and value != value):
        return ABSENT if value is not None else "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Integral):
        return str(int(value))  # of a seed every digit counts
    if isinstance(value, Real):
        as_float = float(value)
        return f"{as_float:.0f}" if as_float.is_integer() and abs(as_float) < 1e15 else f"{as_float:.6g}"
    return value if isinstance(value, str) else orjson.dumps(value, default=str).decode()


def number(text: str) -> float | None:
    """The number that a text is; None where it is none."""
    try:
        return float(text)
    except ValueError:
        return None


def _texts(found: RunSet) -> pd.DataFrame:
    """Every key that can have an effect, as comparable text; the fingerprints of data and model count as keys.

    A run that has none is not known to have had the data of those that have one, so that it is not averaged with them.
    """
    configs = found.configs[[key for key in found.configs.columns if not _below_any(str(key), WITHOUT_EFFECT)]]
    texts = configs.map(lambda value: shown(_canonical(value))).drop(columns="seed", errors="ignore")
    for what, key in FINGERPRINTS.items():
        prints = pd.Series({run: _fingerprint(found.provenance[str(run)].get(what)) for run in configs.index})
        if (prints != ABSENT).any():
            texts[key] = found.configs[key] = prints
    return texts


def _fingerprint(files: Any) -> str:
    """One short hash of a run's files with their sizes and hashes; absent where it wrote down none."""
    if not files:
        return ABSENT
    content = orjson.dumps(files, option=orjson.OPT_SORT_KEYS, default=str)
    return hashlib.blake2b(content, digest_size=6).hexdigest()


def _canonical(value: Any) -> Any:
    """A number written as text on one command line and as a number in another configuration is the same."""
    as_number = number(value) if isinstance(value, str) else None
    return value if as_number is None else as_number


def _follows_seed(key: str, configs: pd.DataFrame) -> bool:
    """Whether a key is the run's seed in every run that has it; a run without a teacher has no seed of a teacher's."""
    there = configs[key].notna()
    return "seed" in configs and bool(there.any() and (configs[key] == configs["seed"])[there].all())


def _follows(key: str, named: Iterable[str], texts: pd.DataFrame) -> bool:
    """Whether a fingerprint only says that the paths differ, which are the keys that `by` names."""
    paths = [one for one in named if _condition(one) == _condition(key)]
    return bool(paths) and bool((texts.groupby(paths)[key].nunique() < 2).all())


def _below(key: str, parent: str) -> bool:
    """Whether a key is another one, or lies below it."""
    return key == parent or key.startswith((f"{parent}.", f"{parent}/"))


def _below_any(key: str, parents: Iterable[str]) -> bool:
    return any(_below(key, parent) for parent in parents)


def _condition(key: str) -> str | None:
    """What is different between runs that differ in this key: data, evaluation, model or budget."""
    if key.startswith("model."):
        return "model" if key in CONDITIONS["model"] else None
    return next((what for what, keys in CONDITIONS.items() if _below_any(key, keys)), None)


def _telling(candidates: Sequence[str], texts: pd.DataFrame, always: Sequence[str]) -> list[str]:
    """As few of the candidates, in their order, as tell apart what all of them together do; those of `always` stay."""
    kept: list[str] = []
    classes = pd.Series(0, index=texts.index)
    for key in dict.fromkeys(candidates):
        finer = texts.groupby([classes, texts[key]], sort=False).ngroup()
        if key in always or finer.nunique() > classes.nunique():
            kept.append(key)
            classes = finer
    return kept


def _complete(found: RunSet, metric: str) -> tuple[list[str], list[dict[str, str]]]:
    """The runs whose results count, and the others with the reason why they do not."""
    complete, left_out = [], []
    for run, row in found.runs.iterrows():
        reason = f": {row['reason']}" if isinstance(row["reason"], str) else ""
        if row["status"] != COMPLETE or pd.isna(row["started"]):
            left_out.append({"run": str(run), "why": f"{row['status']}{reason}"})
        elif metric not in row or pd.isna(row[metric]):
            left_out.append({"run": str(run), "why": f"has no {metric}"})
        else:
            complete.append(str(run))
    return complete, left_out


def _settings(
    group: pd.DataFrame, found: RunSet, knobs: Sequence[str], by: Sequence[str]
) -> tuple[list[Setting], list[dict[str, str]]]:
    """The settings of one field; of several runs of one setting and seed the newest counts."""
    varying = [knob for knob in knobs if group[knob].nunique() > 1]
    wanted = [knob for knob in varying if not by or _below_any(knob, by)]
    over = [knob for knob in varying if knob not in wanted]
    settings: dict[tuple[str, ...], Setting] = {}
    repeated = []
    for run in group.index:  # in the order in which they started
        values = {knob: group.at[run, knob] for knob in wanted}
        setting = settings.setdefault(tuple(values.values()), Setting(values, {}))
        unit = (tuple(group.at[run, knob] for knob in over), shown(found.runs.at[run, "seed"]))
        if unit in setting.runs:
            newer = found.runs.at[run, "run_id"]
            repeated.append({"run": setting.runs[unit], "why": f"was repeated with the same setting and seed: {newer}"})
        setting.runs[unit] = run
    return list(settings.values()), repeated


def _missing(field: Field, found: RunSet, left_out: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Units that some setting has and another has not."""
    units = list(dict.fromkeys(unit for setting in field.settings for unit in setting.runs))
    reasons = {}
    for one in left_out:
        if one["run"] in found.configs.index:
            row = found.configs.loc[one["run"]]
            values = tuple(shown(_canonical(row.get(knob))) for knob in [*field.knobs, *field.over])
            seed = shown(found.runs.at[one["run"], "seed"])
            reasons[(*values, seed)] = f"{found.runs.at[one['run'], 'run_id']} {one['why']}"
    return [
        {
            "setting": setting.label,
            "unit": unit,
            "why": reasons.get((*setting.values.values(), *unit[0], unit[1]), "there is no such run"),
        }
        for setting in field.settings
        for unit in units
        if unit not in setting.runs
    ]
