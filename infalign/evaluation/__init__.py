"""Evaluation: unbiased win rates under any procedure from one table of samples, KL, the limit, attainment."""
