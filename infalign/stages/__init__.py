"""Stages: one function a verb, each callable from a notebook. They join the rooms; nothing imports them but the CLI.

Whoever runs a stage, the command line or Python, imports this first: the libraries are quiet from here on.
"""

from infalign.runtime.console import quiet_libraries

quiet_libraries()
