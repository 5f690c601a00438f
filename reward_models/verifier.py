r"""Right or wrong: compares the completion's answer with a column of the data (GSM8K's `answer`, `\boxed{}`, text).

Algebra (2x = x + x) is beyond it: `reward: trl.rewards.accuracy_reward` with `pip install math-verify` knows it.
"""

import re

_NUMBER = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+)"
_FRACTION = r"\\[dt]?frac\s*(?:\{\s*(-?[\d.]+)\s*\}|(\d))\s*(?:\{\s*([\d.]+)\s*\}|(\d))"
_SIGN = r"(?:(?<![\w.)\]}])[-+])?"  # in 1-5 it is none
_IN_TEXT = re.compile(rf"{_SIGN}(?:\d+ +)?{_NUMBER} ?/ ?{_NUMBER}|{_SIGN}{_NUMBER}")
_SHORT = r"(?:[cmk]m|[mk]g|m[ls]|hrs?|min|mph|kph|ft|in|lbs?|oz|[ap]m)"  # units; 6xy is a product
_UNIT = rf" ?%| ?{_SHORT}(?: ?\^\d)?| (?:[a-z]{{3,}}|[a-z]{{2,}}(?: [a-z]{{2,}})+)(?: ?\^\d)?"
_VALUE = re.compile(rf"([-+]?)(?:(?:(\d+) )?({_NUMBER})/({_NUMBER})|({_NUMBER}))({_UNIT})?")
_STYLE = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\left|\\right|(?<!\\)\\[,;:! ]|\^\s*\{?\\circ\}?|°|\\[()\[\]]|\\?\$")


def build(column="answer", tolerance=1e-6):
    r"""1.0 if the answer is right, 0.0 if not, None (no score) where the data has no answer.

    The completion's answer is what stands in the last whole `\boxed{}`, else after the last `####`, else its last
    number. Numbers (1,000, 0.5, 1/2, 1\frac{1}{2}, $5, 5 cm, 50% as 50 or 0.5) are compared up to `tolerance`
    (relative), anything else as text, ignoring case, white space, \text{} and the like. Units count if both have one.
    """

    def verifier(completions, **columns):
        if column not in columns:
            raise ValueError(f"the data has no column {column!r} with the right answers: name theirs with column=...")
        pairs = zip(completions, columns[column], strict=True)
        return [_score(_text(completion), answer, tolerance) for completion, answer in pairs]

    return verifier


def _score(text, answer, tolerance):
    if answer is None or not str(answer).strip():
        return None
    answer = ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
    wanted = _plain(_marked(answer) or answer)
    given = _plain(_marked(text) or _last_number(text) or text)
    left, right = _value(wanted), _value(given)
    if left is None or right is None:
        return float(wanted in (given, _plain(text)))
    units = {unit for _, unit in (left, right) if unit}
    close = any(abs(a - b) <= tolerance * max(1.0, abs(a)) for a in _readings(*left) for b in _readings(*right))
    return float(close and len(units) < 2)


def _marked(text):
    boxes = [_up_to_brace(text[start.end() :]) for start in re.finditer(r"\\boxed\s*\{", text)]
    whole = [box for box in boxes if box is not None]
    return (whole or re.findall(r"####\s*(.+)", text) or [None])[-1]


def _up_to_brace(text):
    """The text before the brace that closes what was open; None if none does."""
    depth = 1
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:place]
    return None


def _last_number(text):
    numbers = _IN_TEXT.findall(_simple(text))
    return numbers[-1] if numbers else None


def _simple(text):
    r"""One way to write a fraction, a minus and a comma: 1\frac{1}{2} as 1 1/2."""
    text = re.sub(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3})", ",", text).replace("\\%", "%").replace("\N{MINUS SIGN}", "-")
    return re.sub(_FRACTION, r"\1\2/\3\4", re.sub(rf"(?<=\d)\s*(?={_FRACTION})", " ", text))


def _plain(text):
    text = _SPACING.sub(" ", _STYLE.sub(r" \1 ", _simple(text)))
    text = " ".join(text.casefold().split()).rstrip(". ")
    text = re.sub(r"(?<!\w) | (?!\w)", "", text)  # white space counts between two words only
    text = re.sub(r"\{(\w)\}", r"\1", text)  # x^{2}
    text = re.sub(r"^[a-z]=", "", text)  # x = 5
    return re.sub(r"^\((\w)\)$", r"\1", text)  # (E)


def _value(text):
    """(number, unit) of a plain text, None if it is something else."""
    found = _VALUE.fullmatch(text)
    if found is None:
        return None
    sign, whole, above, below, number, unit = found.groups()
    if number is None and not float(below.replace(",", "")):
        return None
    size = _float(number) if number else _float(whole or "0") + _float(above) / _float(below)
    return (-size if sign == "-" else size), (unit or "").strip()


def _readings(number, unit):
    return (number, number / 100) if unit == "%" else (number,)


def _float(text):
    return float(text.replace(",", ""))


def _text(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]
