"""Transcripts: what a cluster does, readable from top to bottom, in testdata/*.txt."""

from __future__ import annotations

from pathlib import Path

from tests.raft.transcript import run_transcript


def test_transcript_says_what_happens(transcript: Path, is_rewriting: bool) -> None:
    """Every block prints what the file says. `--rewrite` makes it so; then the diff is to be read."""
    text = transcript.read_text("utf-8")
    actual = run_transcript(text)
    if is_rewriting:
        transcript.write_text(actual, "utf-8")
    else:
        assert text == actual
