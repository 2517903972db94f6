"""Which file a data set means by a video's name."""

import os
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".flv")  # of training data
# Of benchmarks: those that Video-ChatGPT's scripts and the release try, in their order. They give a
# video with another one no answer, so reading it would be another measurement.
OFFICIAL_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv")


def find_video(folders: Sequence[Path], stems: Sequence[str], suffixes: Sequence[str]) -> Path:
    """The first file, or folder of frames, that is there: by folder, then stem, then suffix.

    Where none is there, the first that was looked for.
    """
    tried = [folder / f"{stem}{end}" for folder in folders for stem in stems for end in suffixes]
    # Unlike Path.exists, False for names that cannot be.
    return next((path for path in tried if os.path.exists(path)), tried[0])
