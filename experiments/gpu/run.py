"""Time and peak memory of each phase of training: ours beside TRL's trainers, with models of real sizes.

    python experiments/gpu/run.py                          what fits into ten minutes; again, and it goes on
    python experiments/gpu/run.py --tiny --one-process     the same in a tiny size on a CPU: does every script run?
    python experiments/gpu/run.py --only sdpo --only gkd   cases whose names contain one of these
    python experiments/gpu/run.py --list                   the cases, and which of them are done
    python experiments/gpu/run.py --write                  RESULTS.md from what has been measured

Each case has a process of its own and a time limit, except with --one-process, which saves their start. Its record is a
line of results.jsonl (results_tiny.jsonl), which is what makes the next call go on after it; a case that fails leaves
its error there, and the others go on.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.gpu import table  # noqa: E402
from experiments.gpu.cases import CASES, Case  # noqa: E402

HERE = Path(__file__).resolve().parent
RESULTS = {False: HERE / "results.jsonl", True: HERE / "results_tiny.jsonl"}
PREPARE_LIMIT_S = 400.0  # for writing 15 GB
ERROR_CHARACTERS = 200


def run_case(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """The record of a case, which may be its error."""
    if arguments.one_process:
        return _measured_here(case, arguments)
    missing = [name for name in case.folders(arguments.tiny) if not (arguments.work / name).is_dir()]
    log = arguments.work / f"{case.name}.log"
    log.unlink(missing_ok=True)
    if missing:
        error = _process(case, ["--prepare"], arguments, log, PREPARE_LIMIT_S)
        if error:
            return _failed(case, error)
    out = arguments.work / f"{case.name}.json"
    out.unlink(missing_ok=True)
    error = _process(case, ["--out", str(out)], arguments, log, arguments.limit_s or case.limit_s)
    return _failed(case, error) if error else json.loads(out.read_text())


def _measured_here(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    from experiments.gpu.device import this_device
    from experiments.gpu.measure import measure

    device = this_device(arguments.tiny, arguments.profile)
    try:
        return measure(case, device, arguments.work, time.time())
    except Exception as error:
        return _failed(case, f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS])


def _process(case: Case, more: list[str], arguments: argparse.Namespace, log: Path, limit_s: float) -> str | None:
    """Runs a case's process; returns what went wrong. Its output is in the log."""
    command = [arguments.python, "-m", "experiments.gpu.measure", case.name, "--work", str(arguments.work), *more]
    command += ["--profile", arguments.profile, "--started", str(time.time()), *(["--tiny"] * arguments.tiny)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # One GPU, since the trainers would spread over all that they see; none for the tiny size.
        "CUDA_VISIBLE_DEVICES": "" if arguments.tiny else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
    }
    with log.open("a") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"not done within its limit of {limit_s:g} s"
        finally:
            _end(process)
    if code == 0:
        return None
    said = _error_in(log.read_text(errors="replace"))
    return f"killed by signal {-code}: {said}" if code < 0 else said


def _error_in(output: str) -> str:
    """The last line that names an error, for libraries may say goodbye after it; else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Exit)\b", line)]
    return (errors or lines or ["no message"])[-1][:ERROR_CHARACTERS]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all that it started, such as a vLLM engine."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _failed(case: Case, error: str) -> dict[str, Any]:
    return {"case": case.name, "date": date.today().isoformat(), "error": error}


def chosen(only: Sequence[str]) -> list[Case]:
    """The cases whose names contain one of these, or all.

    Raises:
        SystemExit: there is none.
    """
    found = [case for case in CASES.values() if not only or any(part in case.name for part in only)]
    if not found:
        raise SystemExit(f"--only {' '.join(only)}: no case is called so; --list shows them")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="in a tiny size on the CPU")
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="cases whose names contain this")
    parser.add_argument("--list", action="store_true", help="the cases, and which are done")
    parser.add_argument("--again", action="store_true", help="also cases that are done; the last record counts")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md from the records, and measure nothing")
    parser.add_argument("--one-process", action="store_true", help="no process of its own for each case, and no limit")
    parser.add_argument("--profile", default="gpu_80gb", help="of conf/hardware, for the card at hand")
    parser.add_argument("--budget-s", type=float, default=570.0, help="no case is begun that might not end within it")
    parser.add_argument("--limit-s", type=float, help="of each case, instead of its own")
    parser.add_argument("--results", type=Path, help="the file of records")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "gpu", help="keeps models and logs")
    parser.add_argument("--python", default=sys.executable, help="of another environment, such as one with vLLM")
    arguments = parser.parse_args(argv)
    arguments.work = arguments.work.resolve()
    if arguments.write:
        (HERE / "RESULTS.md").write_text(table.page(*(table.read(RESULTS[tiny]) for tiny in (False, True))))
        return
    file = arguments.results or RESULTS[arguments.tiny]
    done = table.read(file)
    cases = chosen(arguments.only)
    if arguments.list:
        for case in cases:
            print(f"{case.name:48}", table.state(done.get(case.name)))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    waiting = [case for case in cases if arguments.again or case.name not in done]
    begun = time.monotonic()
    left = 0
    for number, case in enumerate(waiting):
        left_s = arguments.budget_s - (time.monotonic() - begun)
        if number and left_s < (arguments.limit_s or case.limit_s):
            left = len(waiting) - number
            break
        print(f"{case.name} …", flush=True)
        record = run_case(case, arguments)
        with file.open("a") as records:
            records.write(json.dumps(record) + "\n")
        print(f"  {table.state(record)}", flush=True)
    records = table.read(file)
    print(table.table([records[case.name] for case in cases if case.name in records]))
    if left:
        print(f"{left} cases are left: run the same command again")


if __name__ == "__main__":
    main()
