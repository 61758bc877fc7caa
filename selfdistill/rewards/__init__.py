"""Rewards: what scores a completion. One file a family; each is a class that the configuration builds by `_target_`."""

from selfdistill.rewards.answer_likelihood import AnswerLikelihood
from selfdistill.rewards.arithmetic import Arithmetic
from selfdistill.rewards.base import PolicyReward, Reward
from selfdistill.rewards.confidence import Entropy, InverseLoss, SelfCertainty
from selfdistill.rewards.exact import ExactMatch
from selfdistill.rewards.form import Form
from selfdistill.rewards.mix import Mix
from selfdistill.rewards.multiple_choice import MultipleChoice
from selfdistill.rewards.penalties import LengthFloor, RandomReward, RepetitionPenalty
from selfdistill.rewards.python_tests import PythonTests
from selfdistill.rewards.result import normalise
from selfdistill.rewards.scorer import PolicyScorer, TokenStatistics
from selfdistill.rewards.supervised import Supervised
from selfdistill.rewards.tool_calls import ToolCalls

__all__ = [
    "AnswerLikelihood",
    "Arithmetic",
    "Entropy",
    "ExactMatch",
    "Form",
    "InverseLoss",
    "LengthFloor",
    "Mix",
    "MultipleChoice",
    "PolicyReward",
    "PolicyScorer",
    "PythonTests",
    "RandomReward",
    "RepetitionPenalty",
    "Reward",
    "SelfCertainty",
    "Supervised",
    "TokenStatistics",
    "ToolCalls",
    "normalise",
]
