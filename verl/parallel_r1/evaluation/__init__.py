"""Evaluation: sample held-out problems from a checkpoint, grade the responses, and turn the samples into numbers."""
