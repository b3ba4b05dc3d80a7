"""Grading, reward recipes and their schedule."""

from parallel_r1.rewards.reward import RewardResult, score

__all__ = ["RewardResult", "score"]
