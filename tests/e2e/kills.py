"""A child that is killed at random instants and started again until it ends by itself.

One process imports everything once and forks a child per attempt, so that kills land in the work and not in imports.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_HARNESS = """
import os, random, signal, sys, time

import torch

torch.set_num_threads(1)
{imports}

rng, kills = random.Random(0), 0
while True:
    child = os.fork()
    if child == 0:
        {work}
        os._exit(0)
    limit = time.monotonic() + (rng.uniform({shortest}, {longest}) if kills < {wanted} else 600.0)
    while time.monotonic() < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.002)
    if done:
        assert status == 0, status
        break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
print("kills", kills)
"""


def killed(folder: Path, imports: str, work: str, wanted: int, longest: float, shortest: float = 0.0) -> int:
    """Kill the line `work` up to `wanted` times, each within seconds of its start; how often it was.

    Args:
        folder: for the script.
        imports: what `work` needs.
        work: one line of Python.
        wanted: kills.
        shortest, longest: seconds until a kill.
    """
    script = folder / "harness.py"
    settings = {"wanted": wanted, "shortest": shortest, "longest": longest}
    script.write_text(_HARNESS.format(imports=imports, work=work, **settings))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split("kills ")[-1])
