"""Merging aligned policies: mergekit's methods behind checks, DAM's learned coefficients, and the mixture of logits."""
