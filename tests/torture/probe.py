import time, sys
from tests.torture import kills, trials
from tests.fuzz.forks import prepare

t = time.time()
prepare()
print("prepare", time.time() - t, flush=True)
from collections import Counter

for run in trials.RUNS:
    t = time.time()
    try:
        ref, ch = trials.unbroken(run)
    except RuntimeError as e:
        print(run, str(e)[-1500:])
        continue
    print(run, round(time.time() - t, 2), len(ch), Counter(c.split()[0] for c in ch), flush=True)
    t = time.time()
    tr = trials.trained(trials.arguments(run), __import__("pathlib").Path(__import__("tempfile").mkdtemp()))
    print("again", time.time() - t, tr.code, flush=True)
    for p in (3, len(ch) // 3, len(ch) // 2, len(ch) - 5):
        t = time.time()
        print(kills._killed(run, [p]), round(time.time() - t, 2), flush=True)
