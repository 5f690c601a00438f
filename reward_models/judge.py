"""A pairwise judge of your own: prefers the answer with more of the words of the question. For trying things out."""


def build(tie=0.5):
    """Of each pair the probability that the answer shown first is better; `tie` where they do equally well."""

    def judge(prompts, firsts, seconds):
        return [_verdict(_text(p), _text(a), _text(b), tie) for p, a, b in zip(prompts, firsts, seconds, strict=True)]

    return judge


def _verdict(prompt, first, second, tie):
    wanted = set(prompt.lower().split())
    hits = [len(wanted & set(text.lower().split())) for text in (first, second)]
    return tie if hits[0] == hits[1] else float(hits[0] > hits[1])


def _text(content):
    return content if isinstance(content, str) else content[-1]["content"]
