"""A pytest plugin: the process in which unsloth has been imported and has rewritten TRL, as it does beside a GPU."""

import os
from importlib import import_module

os.environ["UNSLOTH_ALLOW_CPU"] = "1"  # lets it be imported without a GPU, and would leave TRL alone
unsloth = import_module("unsloth")
del os.environ["UNSLOTH_ALLOW_CPU"]
import_module("unsloth.models.rl").PatchFastRL(FastLanguageModel=unsloth.FastLanguageModel)
replaced = import_module("trl").GRPOTrainer.__module__
assert replaced != "trl.trainer.grpo_trainer", "unsloth no longer puts a trainer of its own there"
