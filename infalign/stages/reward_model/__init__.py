"""`infalign reward-model`: its keys, the training, and what held-out pairs say of the result."""
