"""Write built-in scenes as video files with annotations in UMT's format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from repshift_cli.data.builtin.moving_shapes import ANSWERS, caption, render, scenes, two_questions
from repshift_cli.errors import UsageError
from repshift_cli.utils.files import atomic_output, write_text


def write_clip(frames: np.ndarray, path: Path, rate: int = 8) -> None:
    """Encode frames as an H.264 video in an MP4 file; an existing file is replaced.

    Args:
        frames: uint8 `[T, H, W, 3]`, RGB, of even height and width.
        rate: frames per second.

    Raises:
        UsageError: PyAV is not installed, or a side is odd.
        OutputError: the file cannot be written.
    """
    try:
        import av
    except ImportError as error:
        raise UsageError("videos need PyAV", "Install it with: pip install 'repshift-cli[video]'") from error
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise UsageError(f"a video of {width}x{height} pixels cannot be encoded", "Choose even sides.")
    with atomic_output(path, force=True) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "8", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))


def write_dataset(folder: Path, count: int, seed: int, frames: int, size: int) -> None:
    """Write scenes with different captions as videos, with annotations in the format of UMT.

    Writes `videos/*.mp4`, `retrieval.json` (a caption for each video), `qa.json` (two questions for each) and
    `answers.json` (the list of all answers).

    Raises:
        UsageError: the folder has videos already, or as `scenes` and `write_clip`.
        OutputError: a file cannot be written.
    """
    drawn = scenes(count, seed)
    videos = folder / "videos"
    try:
        videos.mkdir(parents=True)
    except FileExistsError as error:
        raise UsageError(f"{videos} already exists", "Choose another folder.") from error
    retrieval: list[dict[str, str]] = []
    rows: list[dict[str, str | int]] = []
    for index, one in enumerate(drawn):
        name = f"{index:05d}.mp4"
        write_clip(render(one, frames, size), videos / name)
        retrieval.append({"video": name, "caption": caption(one)})
        for question, answer in two_questions(one):
            rows.append({"question_id": len(rows), "video": name, "question": question, "answer": answer})
    for file, content in (("retrieval.json", retrieval), ("qa.json", rows), ("answers.json", list(ANSWERS))):
        write_text(folder / file, json.dumps(content, indent=1) + "\n", force=True)
