"""Calibration: where does a reward stand among the base policy's own rewards on the same prompt?

`quantile.py` is the mathematics, `table.py` the cached samples and scores on disk, `diagnostics.py` what can be wrong
with them.
"""
