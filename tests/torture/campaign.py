import json, os, random, sys, time
from pathlib import Path
from tests.fuzz.forks import prepare

prepare()
from tests.torture import kills, trials

END = float(sys.argv[1])
tasks = []
for run in trials.RUNS:
    n = len(trials.unbroken(run)[1])
    pts = [1 + round(i * (n - 1) / 124) for i in range(125)]
    tasks += [(run, [p]) for p in pts]
    d = random.Random(run)
    tasks += [(run, [d.randint(1, n), d.randint(1, n // 2)]) for _ in range(15)]
random.Random(1).shuffle(tasks)
for i, (run, pts) in enumerate(tasks):
    if time.time() > END:
        break
    try:
        os.mkdir(f"/tmp/Fc/claims/{i}")
    except FileExistsError:
        continue
    t = time.time()
    try:
        out = kills._killed(run, pts)
    except Exception as e:
        out = ("harness error", repr(e))
    with open("/tmp/Fc/results.jsonl", "a") as f:
        f.write(json.dumps([run, pts, out, round(time.time() - t, 1)]) + "\n")
