"""What the workers have in common: requests come as lines of JSON, answers go as lines of JSON."""

import json
import os
import sys


def serve(make):
    """Makes the model from the settings in the first argument, then answers requests until the input ends.

    Args:
        make: from settings to an object with a method for each request.
    """
    # The programs print what they like; the answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model = make(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(model, request.pop("do"))(**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
