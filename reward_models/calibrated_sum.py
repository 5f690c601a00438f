"""Kind and of the right length: two rewards, each by its quantile among base samples, so that scales do not matter."""

from pathlib import Path

from infalign.rewards.combine import weighted_sum

HERE = Path(__file__).parent


def build(load_member, target=20, weight=0.3):
    """Sentiment, plus `weight` times nearness to `target` words."""
    near = {"reward": f"{HERE}/length.py:build", "reward_kwargs": {"target": target}, "weight": weight}
    return weighted_sum([f"{HERE}/vader.py:build", near], load_member)
