from __future__ import annotations

from pathlib import Path

import pytest

from digitdist.checkpoint import Checkpoint
from digitdist.runs.finished import is_finished


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x04N.", b"nonsense"])
def test_damaged_predictions_are_told_as_what_they_are(tmp_path: Path, content: bytes):
    weights = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # SHA-256 of nothing
    (tmp_path / "result.json").write_text(f'{{"steps": 5, "weights_sha256": "{weights}"}}')
    (tmp_path / "predictions.npz").write_bytes(content)
    said: list[str] = []
    assert not is_finished(tmp_path, Checkpoint({"model": {}}, {"step": 5}), said.append)
    assert said == [f"{tmp_path}/predictions.npz: File is not a zip file; it is made again"]
