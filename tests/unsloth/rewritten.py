"""A pytest plugin: the process in which unsloth has been imported and has rewritten TRL, as it does beside a GPU."""

import os

os.environ["UNSLOTH_ALLOW_CPU"] = "1"  # lets it be imported without a GPU, and would leave TRL alone

import trl
import unsloth
from unsloth.models.rl import PatchFastRL

del os.environ["UNSLOTH_ALLOW_CPU"]
PatchFastRL(FastLanguageModel=unsloth.FastLanguageModel)
assert trl.GRPOTrainer.__module__ != "trl.trainer.grpo_trainer", "unsloth no longer puts a trainer of its own there"
