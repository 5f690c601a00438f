"""Generation: prompts in, samples out. One random stream per sample, every sampling field explicit.

`plan.py` cuts work into batches, `hf.py` samples with a transformers model (each prompt computed and kept once:
`models/shared_prefix.py`), `vllm_engine.py` with vLLM; `likelihood.py` reads log-probabilities and KL off a model.
`openai.py` samples from a server: `server.py` reaches it, `served_model.py` knows whether it is the model that it
should be.
"""
