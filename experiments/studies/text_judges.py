"""Judges of sentences that share nothing with what has written them: data, words, architecture.

Both read whole words of part "judge" of the data (`experiments.lines`): a logistic regression on
words and pairs of words says whether a line is positive, an interpolated Kneser-Ney trigram model
how surprising it is.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

#: Words before and after a line.
_BEGIN, _END = "<s>", "</s>"
_UNKNOWN = "<unk>"


def sentiment_judge(texts: Sequence[str], labels: Sequence[int]) -> Any:
    """A scikit-learn classifier of lines, 1 for positive."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(
        ngram_range=(1, 2), min_df=2, token_pattern=r"\S+", lowercase=False, sublinear_tf=True
    )
    return make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000)).fit(texts, labels)


class KneserNey:
    """Interpolated Kneser-Ney trigrams (Chen and Goodman, 1998, equation 27), one discount each.

    Words that occurred once are the unknown word, so that every line has a finite perplexity.
    """

    def __init__(self, texts: Iterable[str], discount: float = 0.75):
        rows = [text.split() for text in texts]
        counts = Counter(word for row in rows for word in row)
        self._words = {word for word, count in counts.items() if count > 1}
        self._discount = discount
        trigrams: Counter[tuple[str, ...]] = Counter()
        for row in rows:
            words = self._framed(row)
            trigrams.update(zip(words, words[1:], words[2:], strict=False))
        # Below the highest order, a count is the number of different words before.
        bigrams = Counter((b, c) for _, b, c in trigrams)
        unigrams = Counter(c for _, c in bigrams)
        self._total = sum(unigrams.values())
        self._unigrams = unigrams
        self._orders = []
        for counted in (trigrams, bigrams):
            sums: dict[tuple[str, ...], int] = defaultdict(int)
            kinds: dict[tuple[str, ...], int] = defaultdict(int)
            for gram, count in counted.items():
                sums[gram[:-1]] += count
                kinds[gram[:-1]] += 1
            self._orders.append((counted, sums, kinds))

    def _framed(self, row: Sequence[str]) -> list[str]:
        known = (word if word in self._words else _UNKNOWN for word in row)
        return [_BEGIN, _BEGIN, *known, _END]

    def probability(self, gram: tuple[str, ...]) -> float:
        """P(last | the one or two words before) of known words; they sum to 1 over the last."""
        if len(gram) == 1:
            uniform = 1 / (len(self._words) + 2)  # The unknown word and the end.
            lost = self._discount * len(self._unigrams) / self._total
            kept = max(self._unigrams[gram[0]] - self._discount, 0) / self._total
            return kept + lost * uniform
        counted, sums, kinds = self._orders[0 if len(gram) == 3 else 1]
        lower = self.probability(gram[1:])
        total = sums.get(gram[:-1], 0)
        if not total:
            return lower
        kept = max(counted[gram] - self._discount, 0) / total
        return kept + self._discount * kinds[gram[:-1]] / total * lower

    def nats(self, text: str) -> tuple[float, int]:
        """-log p of a line with its end, and the number of words that this is of."""
        words = self._framed(text.split())
        grams = zip(words, words[1:], words[2:], strict=False)
        return -sum(math.log(self.probability(gram)) for gram in grams), len(words) - 2

    def perplexity(self, texts: Iterable[str]) -> float:
        """Per word, over all lines together."""
        nats, counts = zip(*(self.nats(text) for text in texts), strict=True)
        return math.exp(sum(nats) / sum(counts))


def distinct(texts: Sequence[str], order: int = 2) -> float:
    """Share of different n-grams of words among all of a set of lines (arXiv:1510.03055)."""
    rows = [text.split() for text in texts]
    grams = [tuple(row[i : i + order]) for row in rows for i in range(len(row) - order + 1)]
    return len(set(grams)) / max(len(grams), 1)


def positive_share(judge: Any, texts: Sequence[str]) -> np.ndarray:
    """Probability [N] that lines are positive."""
    return judge.predict_proba(list(texts))[:, 1]
