import pytest
from transformers import TrainerState

from selfdistill.errors import UserError
from selfdistill.rewards import LengthFloor, RandomReward, RepetitionPenalty


def ids_only(reward, completion_ids):
    return reward(
        prompts=[""] * len(completion_ids), completions=[""] * len(completion_ids), completion_ids=completion_ids
    )


def test_repetition():
    found = ids_only(RepetitionPenalty(ngram_tokens=2), [[1, 2, 3, 4], [1, 1, 1, 1, 1], [1, 2, 1, 2], [1], []])
    assert found == pytest.approx([0.0, -0.75, -1 / 3, 0.0, 0.0])


def test_length_floor():
    assert ids_only(LengthFloor(min_tokens=4), [[], [1], [1, 2], [1] * 4, [1] * 9]) == [-1.0, -0.75, -0.5, 0.0, 0.0]


def test_random_reward_depends_on_seed_step_and_call_alone():
    def draws(reward, step):
        return reward(prompts=[""] * 64, completions=[""] * 64, trainer_state=TrainerState(global_step=step))

    unbroken = RandomReward(seed=1)
    first = [draws(unbroken, step) for step in (0, 0, 1, 2)]
    resumed = RandomReward(seed=1)
    assert draws(resumed, 2) == first[3]
    assert len({tuple(draw) for draw in first}) == 4
    assert draws(RandomReward(seed=2), 0) != first[0]
    assert 0.25 < sum(map(sum, first)) / 256 < 0.75
    assert set(draws(RandomReward(probability=0.0), 0)) == {0.0}


def test_wrong_settings_name_the_key():
    for build, key in (
        (lambda: RepetitionPenalty(0), "ngram_tokens"),
        (lambda: LengthFloor(0), "min_tokens"),
        (lambda: RandomReward(probability=1.5), "probability"),
    ):
        with pytest.raises(UserError, match=f"reward.{key}"):
            build()
