"""Forgetting a skill by randomised fine-tuning: tasks, scoring, and measures of what went and what stayed.

The method and its experiments: "Unforgettable Generalization in Language Models" (arXiv:2409.02228). Only `stages`
imports this room.
"""
