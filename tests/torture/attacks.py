"""What code that a model wrote may try, in the sandbox that this machine has.

python -m tests.torture attacks
"""

import os
import socket

from selfdistill.rewards import sandbox
from tests.fuzz.forks import Row, counted, empty_folder
from tests.rewards.attacks import ATTACKS, INNOCENT, Attack


def rows() -> list[Row]:
    """What came of the attacks of each kind, and of code that means no harm."""
    found = sandbox.bubblewrap()
    boxes: list[sandbox.Sandbox] = [sandbox.Bare() if isinstance(found, str) else found, sandbox.Bare()]
    kinds, where = (
        dict.fromkeys(attack.kind for attack in ATTACKS),
        boxes[0].name.partition(" (")[0],
    )  # without its path
    tried = [
        counted(f"{kind}, {where}", [_attacked(one, boxes[0]) for one in ATTACKS if one.kind == kind]) for kind in kinds
    ]
    forged = [one for one in ATTACKS if one.kind in ("results", "hack")]
    tried.append(counted("results and hacks, without a sandbox", [_attacked(one, boxes[1]) for one in forged]))
    return [*tried, counted(f"innocent code, {where}", [_innocent(name, boxes[0]) for name in INNOCENT])]


def _attacked(attack: Attack, box: sandbox.Sandbox) -> tuple[str, str]:
    with empty_folder() as folder, socket.create_server(("127.0.0.1", 0)) as listening:
        victim = folder / "victim"
        victim.write_text("kept")
        names = {"victim": str(victim), "folder": str(folder), "pid": os.getpid(), "port": listening.getsockname()[1]}
        code = attack.code.format(**names) if "{{" in attack.code or attack.kind != "hack" else attack.code
        outcomes = box.run(sandbox.Task(code, list(attack.tests), 3.0, 512, 1, 32))
        if all(kind == "ok" for kind, _ in outcomes):
            return "a full score", f"{attack.kind}, {attack.name}: {outcomes}"
        if os.listdir(folder) != ["victim"] or victim.read_text() != "kept":
            return "harm outside", f"{attack.kind}, {attack.name}: {os.listdir(folder)}"
    return "no score, no harm", ""


def _innocent(name: str, box: sandbox.Sandbox) -> tuple[str, str]:
    code, test = INNOCENT[name]
    outcomes = box.run(sandbox.Task(code, [test], 10.0, 512, 1, 32))
    return ("a full score", "") if outcomes == [("ok", "")] else ("refused", f"{name}: {outcomes}")
