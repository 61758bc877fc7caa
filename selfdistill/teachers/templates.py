"""The default wording of what a teacher is shown. Every template can be replaced in the configuration or by a file.

The embedded model was trained on exactly these words (experiments/embedded_model), so changing a default here
means building it again.
"""

DEMONSTRATION = """{prompt}

An example of a good response:
{demonstration}

Now answer in your own words."""

ANSWER = """{prompt}

The reference solution:
{answer}

Understand it, then answer in your own words."""

FEEDBACK = "{prompt}{solution}{feedback}\n\nNow answer the original question."
SOLUTION_BLOCK = "\n\nA correct solution:\n{solution}"
FEEDBACK_BLOCK = "\n\nFeedback on an earlier, unsuccessful attempt:\n{feedback}"
