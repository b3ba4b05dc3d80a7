"""Grading, reward recipes and their schedule."""
