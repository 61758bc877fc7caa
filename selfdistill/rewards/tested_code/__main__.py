"""Judges one completion's code by tests. It runs as a program of its own, in a sandbox; imports nothing of ours.

Two processes share the work. The judge holds the tests and never runs a line of the tested code. The solution process
holds the code, and starts a fork of itself for each test. Between them go questions and answers as plain data (JSON
over pipes): where a test calls a function of the solution, the judge sends the arguments, receives a value and compares
it itself. So the tested code sees neither a test nor an expected value, and an object that claims to equal everything
equals nothing. What the solution process sends is only ever read as data.

An answer that is not plain data (an object of the solution's own class, a function, a generator) is held by the
judge as a `Proxy`, whose calls, attributes and items are asked of the solution process. Comparisons with plain data are
never asked of it.

stdin: one JSON object (`Task` in sandbox.py says what is in it).
stdout: one line for each test as soon as it has ended: the token, and a JSON object with kind and text.
"""

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress

from judge import Judge, judged
from plain_data import MESSAGE_CHARACTERS, Printed
from solution import Solution, limit

SET_DUMPABLE = 4  # prctl's number: whether other processes may look into this one's memory and descriptors


def main():
    # Nobody may look into the judge, which holds the tests and the descriptor for the results.
    libc = ctypes.CDLL(None)
    libc.prctl(SET_DUMPABLE, 0, 0, 0, 0)
    task_in, results = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    questions, answers = os.pipe(), os.pipe()
    process = os.fork()
    if process == 0:
        # The tests have not been read yet, so that this process has no copy of them.
        for descriptor in (task_in, results, null, questions[1], answers[0]):
            os.close(descriptor)
        libc.prctl(SET_DUMPABLE, 1, 0, 0, 0)
        solution = Solution(questions[0], answers[1])
        solution.start()
        solution.serve()
    os.close(questions[0])
    os.close(answers[1])
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    with os.fdopen(task_in, "rb") as file:
        task = json.load(file)
    task["folder"] = None
    if task["uid"] is not None and os.geteuid() == 0:
        from tempfile import mkdtemp  # takes a while, and most sandboxes do without

        task["folder"] = mkdtemp()
        os.chown(task["folder"], task["uid"], -1)
    limit({"RLIMIT_AS": task["limits"]["RLIMIT_AS"]})
    sys.path += task["packages"]
    sys.stdout = sys.stderr = Printed()

    def report(kind, text):
        text = text[:MESSAGE_CHARACTERS].encode(errors="replace").decode()
        os.write(results, (task["token"] + json.dumps({"kind": kind, "text": text}) + "\n").encode())

    judged(Judge(questions[1], answers[0], task), task, report)
    with suppress(OSError):
        os.killpg(process, signal.SIGKILL)
    os._exit(0)  # whatever threads or exit handlers a test has left


if __name__ == "__main__":
    main()
