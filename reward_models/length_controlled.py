"""Sentiment without what a longer answer gains by its length alone."""

from pathlib import Path

from infalign.rewards.length_control import LengthControlled

HERE = Path(__file__).parent


def build(load_member, coefficient=0.01):
    """VADER's score less `coefficient` a word; give LengthControlled `samples=FILE` to have it fitted."""
    return LengthControlled(f"{HERE}/vader.py:build", coefficient=coefficient, load_member=load_member)
