"""What a reward can depend on: conditions that hold or not, and quantities, of one graded response.

Source of the quantities: the published code, of which they are bit for bit (``efficiency`` counts words of the text
without its tags, where two tags that touch join the words around them).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from parallel_r1.rewards.grading import Grade
from parallel_r1.tags import PARALLEL_OPEN, TAGS

_TAG = re.compile("|".join(map(re.escape, TAGS)))
_BLOCK = re.compile(r"<Parallel>(.*?)</Parallel>", re.DOTALL)
_PATH = re.compile(r"<Path>(.*?)</Path>", re.DOTALL)


@dataclass(frozen=True)
class Response:
    """One graded response; everything else is derived on demand."""

    text: str
    grade: Grade
    violations: list[str]

    @cached_property
    def blocks(self) -> list[list[str]]:
        """Texts of the paths of every closed block."""
        return [_PATH.findall(block) for block in _BLOCK.findall(self.text)]

    # ---- conditions

    @property
    def correct(self) -> bool:
        return self.grade.correct

    @property
    def wrong(self) -> bool:
        return not self.correct

    @property
    def answered(self) -> bool:
        return self.grade.answer is not None

    @property
    def block(self) -> bool:
        return PARALLEL_OPEN in self.text

    @property
    def no_block(self) -> bool:
        return not self.block

    @property
    def valid(self) -> bool:
        return not self.violations

    # ---- quantities

    @property
    def one(self) -> float:
        return 1.0

    @property
    def sqrt_blocks(self) -> float:
        return math.sqrt(self.text.count(PARALLEL_OPEN))

    @property
    def words(self) -> float:
        """Words of the response without its tags."""
        return float(_words(self.text))

    @cached_property
    def efficiency(self) -> float:
        """Share of words that are not on the critical path, in [0, 1)."""
        saved = sum(
            _words(block) - max(_words(path) for path in paths)
            for block, paths in zip(_BLOCK.findall(self.text), self.blocks, strict=True)
            if paths
        )
        return saved / self.words if self.words else 0.0

    @cached_property
    def self_bleu(self) -> float:
        """Mean BLEU of a path against each later path of its block, in [0, 1]; 1 for a block of one, or without any."""
        from sacrebleu.metrics import BLEU

        bleu = BLEU(effective_order=True)
        scores = []
        for paths in self.blocks:
            pairs = [bleu.sentence_score(a, [b]).score / 100 for a, b in combinations(paths, 2)]
            scores.append(sum(pairs) / len(pairs) if pairs else 1.0)
        return sum(scores) / len(scores) if scores else 1.0


def _words(text: str) -> int:
    return len(_TAG.sub("", text).split())


CONDITIONS = ("correct", "wrong", "answered", "block", "no_block", "valid")
QUANTITIES = ("one", "sqrt_blocks", "words", "efficiency", "self_bleu")
