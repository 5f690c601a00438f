"""Claims of the benchmarks that do not depend on how busy the machine is."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks import bench


@pytest.mark.slow
def test_log_probabilities_take_a_quarter_of_the_memory(tmp_path, capsys):
    bench.memory(tmp_path)
    mib = json.loads(capsys.readouterr().out.splitlines()[-1])["MiB"]
    assert 0 < 4 * mib["infalign"] <= mib["plain logits"]
    assert mib["infalign"] <= mib["trl's chunked head"]


@pytest.mark.slow
def test_a_second_calibration_draws_nothing(tmp_path, capsys):
    bench.cache(tmp_path)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["drawn_first"] == 72 and found["drawn_second"] == 0
