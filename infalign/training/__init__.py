"""Training: CTRL on TRL's RLOO. `reward.py` works in any TRL trainer; `trainer.py` is the fast and checked way."""
