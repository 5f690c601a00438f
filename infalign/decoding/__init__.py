"""Decoding: a sampler, a reward and a procedure make one chosen completion a prompt."""
