"""Generation: prompts in, samples out. One random stream per sample, every sampling field explicit.

`plan.py` cuts work into batches, `shared_prefix.py` computes each prompt once and repeats its KV cache, `hf.py` samples
with a transformers model, `likelihood.py` reads log-probabilities and KL off one.
"""
