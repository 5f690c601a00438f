"""`infalign sweep`: many runs from one YAML, and their objectives compared at equal KL.

`recipe` reads the YAML and makes its cells, `cells` runs one, `run` runs them all, `table` says what came out.
"""
