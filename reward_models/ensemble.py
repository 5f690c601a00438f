"""Several reward models trained alike, as one that trusts what they agree on: mean minus standard deviations."""

from infalign.rewards.combine import pessimistic


def build(load_member, models, penalty=1.0):
    """`models`: folders, Hub ids or file.py:name of at least two rewards on one scale; `penalty` in deviations."""
    return pessimistic(models, penalty, load_member)
