"""A reward that ends the run it is used in, at a chosen step, in the way that the environment names."""

import os
import signal
from typing import Any

VARIABLE = "SABOTAGE"  # kill:6, term:6 or fail:6


class Saboteur:
    """Scores completions by their characters, until the first batch of rollouts at or after the step."""

    def __call__(self, completions: list, trainer_state: Any, **_: Any) -> list[dict]:
        how, _, step = os.environ.get(VARIABLE, "none:0").partition(":")
        if how != "none" and trainer_state.global_step >= int(step):
            if how == "fail":
                raise ValueError("out of luck")
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGTERM)
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [{"score": float(sum(map(ord, text)) % 7), "feedback": f"not {text}"} for text in texts]
