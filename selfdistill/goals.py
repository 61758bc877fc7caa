"""Of which metrics less is better: the one place that comparison, loggers and `keep_best` ask."""

import re

# By the end of their names, since suites, processes and evaluations put words before it. What a reward is called after
# says nothing: of `reward/inverse_loss` more is better.
_LESS = re.compile(
    r"(?!reward).*("
    r"forgetting|loss|perplexity|cross_entropy|(^|/)kl|divergence|sampler_gap|wall_s|peak_memory_gib"
    r")"
)


def is_more_better(metric: str) -> bool:
    return _LESS.fullmatch(metric) is None
