r"""Right or wrong: compares the completion's answer with a column of the data (GSM8K's `answer`, `\boxed{}`, text)."""

import re

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")
_MARKED = (re.compile(r"\\boxed\{([^{}]*)\}"), re.compile(r"####\s*(.+)"))


def build(column="answer", tolerance=1e-6):
    """1.0 if the answer is right, 0.0 if not, None (no score) where the data has no answer.

    The completion's answer is what stands in the last `\\boxed{}` or after the last `####`, else its last number. Two
    numbers are compared up to `tolerance` (relative), anything else as text, ignoring case and white space.
    """

    def verifier(completions, **columns):
        if column not in columns:
            raise ValueError(f"the data has no column {column!r}; set column to one of {', '.join(columns)}")
        pairs = zip(completions, columns[column], strict=True)
        return [_score(_text(completion), answer, tolerance) for completion, answer in pairs]

    return verifier


def _score(text, answer, tolerance):
    if answer is None or not str(answer).strip():
        return None
    wanted, given = _marked(str(answer)) or str(answer), _marked(text) or _last_number(text)
    if given is None:
        return float(_plain(wanted) == _plain(text))
    left, right = _value(wanted), _value(given)
    if left is None or right is None:
        return float(_plain(wanted) in (_plain(given), _plain(text)))
    return float(abs(left - right) <= tolerance * max(1.0, abs(left)))


def _marked(text):
    return next((found[-1].strip() for pattern in _MARKED if (found := pattern.findall(text))), None)


def _last_number(text):
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _value(text):
    text = _plain(text).strip("$ .")
    return float(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def _plain(text):
    return " ".join(text.casefold().split())


def _text(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]
