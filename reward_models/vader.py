"""Sentiment of the completion by VADER: a real reward that needs no download and no GPU. Many exact ties at 0."""

try:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
except ImportError:
    SentimentIntensityAnalyzer = None


def build():
    """The compound score of the completion, in [-1, 1] (1: most positive)."""
    if SentimentIntensityAnalyzer is None:
        raise ImportError("the package vaderSentiment is not installed; pip install vaderSentiment")
    analyzer = SentimentIntensityAnalyzer()

    def vader(completions, **_):
        return [analyzer.polarity_scores(_text(completion))["compound"] for completion in completions]

    return vader


def _text(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]
