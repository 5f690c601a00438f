"""Length of the completion, or nearness to a wished one: the smallest reward there is, for trying things out."""

_COUNT = {"words": lambda text: len(text.split()), "characters": len}


def build(target=None, unit="words"):
    """Score: the number of `unit` (words, characters, tokens); with a `target`, minus the distance to it."""
    if unit not in (*_COUNT, "tokens"):
        raise ValueError(f"unit is words, characters or tokens, got {unit!r}")

    def length(completions, completion_ids=None, **_):
        if unit == "tokens":
            sizes = [len(ids) for ids in completion_ids]
        else:
            sizes = [_COUNT[unit](_text(completion)) for completion in completions]
        return [float(size if target is None else -abs(size - target)) for size in sizes]

    return length


def _text(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]
