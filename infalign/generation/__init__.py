"""Generation: prompts in, samples out. One random stream per sample, every sampling field explicit.

`plan.py` cuts work into batches, `shared_prefix.py` computes each prompt once and repeats its KV cache, `hf.py` samples
with a transformers model, `likelihood.py` reads log-probabilities and KL off one. `openai.py` samples from a server:
`address.py` and `server.py` reach it, `wire.py` knows what it is asked and answers, `served_model.py` whether it is the
model that it should be.
"""
