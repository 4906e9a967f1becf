"""The benchmark of whole models runs, and says what it did, at a size that a CPU can do."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from benchmarks.tpot import __main__ as tpot

TINY = ["--device", "cpu", "--layers", "2", "--hidden", "256", "--budget", "128"]


@pytest.mark.thorough
@pytest.mark.usefixtures("without_inductor")
def test_ways_to_decode_are_measured_side_by_side(tmp_path, capsys):
    path, plot = tmp_path / "tpot.json", tmp_path / "tpot.png"
    ours = [*TINY, "--contexts", "512", "--batches", "1", "2", "--json", str(path)]
    assert tpot.main([*ours, "--ways", "eager", "sparse"]) == 0
    assert (
        tpot.main([*TINY, "--cells", "eager:1:1k", "--json", str(path), "--plot", str(plot)]) == 0
    )
    report = json.loads(path.read_text())
    found = {(each["way"], each["batch"], each["context"]): each for each in report["records"]}
    assert set(found) == {
        *((way, batch, 512) for way in ("eager", "sparse") for batch in (1, 2)),
        ("eager", 1, 1024),
    }
    assert all(each["status"] == "measured" for each in found.values())
    assert all(each["milliseconds"] > 0 for each in found.values())
    assert found["sparse", 1, 512]["sites"] == {"sparse": 2}
    assert found["sparse", 1, 512]["lychee_seconds"] > 0
    assert found["eager", 1, 512]["sites"] == {}
    assert len(report["commands"]) == 2
    assert plot.stat().st_size > 1000
    assert "lychee sparse" in capsys.readouterr().out


def test_a_cell_that_makes_no_sense_is_refused(capsys):
    with pytest.raises(SystemExit):
        tpot.main([*TINY, "--cells", "sparse:128k"])
    assert "'sparse:128k' is no WAY:BATCH:CONTEXT" in capsys.readouterr().err
