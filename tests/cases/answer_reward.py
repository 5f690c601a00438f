def reward(completions, answer, **columns):
    return [
        float((c if isinstance(c, str) else c[-1]["content"]).strip() == str(a)) for c, a in zip(completions, answer)
    ]
