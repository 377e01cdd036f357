"""`repshift eval` for models of video and text: tables, JSON and errors."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _shape_videos
import numpy as np
import pytest
from outcome import Command, Outcome
from safetensors.torch import save_file
from tiny_umt import tiny_umt, umt_plan, umt_recipe

from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.loaded import ModelDescription
from repshift_cli.checkpoints.weights import METADATA_KEY
from repshift_cli.data.preprocessing import Preprocessing

COUNT, FRAMES = 6, 5
RETRIEVAL_KEYS = {
    "model",
    "task",
    "dataset",
    "protocol",
    "annotations",
    "videos",
    "captions",
    "skipped",
    "skipped_files",
    "missing",
    "padded",
    "gmacs",
    "videos_per_s",
    "pooling",
    "rerank_k",
    "scoring",
    "text_to_video",
    "video_to_text",
    "vtc",
    "preprocessing",
    "memory",
}
QA_KEYS = {"model", "task", "dataset", "questions", "accuracy", "accuracy_interval", "answers", "unanswerable", "gmacs"}


def save_umt(path: Path, embed_dim: int) -> Path:
    """A tiny UMT of the built-in vocabulary, in the form of the built-in models; and a compressed one beside it."""
    model = tiny_umt(embed_dim=embed_dim)
    args = {"vision": asdict(model.vision), "text": asdict(model.text), "embed_dim": embed_dim}
    description = ModelDescription(path.stem, "umt", args, Preprocessing.of_model(model))
    tensors = {key: value.detach().clone().contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps({"model": description.to_dict()})})
    loaded, recipe = load_checkpoint(path), umt_recipe("[{layer: 0, drop_ratio: 0.5}]")
    document = artifact.make_document(loaded, umt_plan(model, recipe), recipe, None, {})
    artifact.save(path.with_suffix(".compressed.safetensors"), loaded, document)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models, dense and compressed, and a few videos with captions and questions."""
    folder = tmp_path_factory.mktemp("shapes")
    save_umt(folder / "umt-shapes.safetensors", 24)
    save_umt(folder / "umt-shapes-qa.safetensors", 0)
    _shape_videos.write_dataset(folder, COUNT, seed=1, frames=FRAMES, size=32)
    return folder


def own(folder: Path, file: str = "retrieval.json") -> tuple[object, ...]:
    return ("--annotations", folder / file, "--videos", folder / "videos")


def changed(folder: Path, target: Path, file: str = "retrieval.json", **first: Any) -> Path:
    """The annotations with other values in their second row."""
    rows = json.loads((folder / file).read_text())
    rows[1] = {key: value for key, value in {**rows[1], **first}.items() if value is not None}
    target.write_text(json.dumps(rows))
    return target


def parsed(outcome: Outcome) -> Any:
    assert outcome.rc == 0, outcome.stderr
    return json.loads(outcome.stdout)


def lines_of(outcome: Outcome) -> list[str]:
    assert outcome.rc == 0, outcome.stderr
    lines = [line.rstrip() for line in outcome.stdout.splitlines()]
    assert all(len(line) <= 80 for line in lines), outcome.stdout
    return lines


class TestRetrieval:
    def test_table(self, cli: Command, folder: Path) -> None:
        model = folder / "umt-shapes.compressed.safetensors"
        lines = lines_of(cli("eval", model, *own(folder), "--compare-dense", "--rerank-k", 3))
        text = "\n".join(lines)
        rows = [line.split()[:2] for line in lines if line.startswith(("compressed  ", "dense  "))]
        rankings = [[name, way] for name in ("compressed", "dense") for way in ("matching", "similarity")]
        assert rows == [*rankings, *rankings, ["compressed", "24"], ["dense", "48"]]
        for part in ("text to video", "video to text", "R@1", "R@10", "median", "GMACs/video", "videos/s"):
            assert part in text
        assert f"retrieval: {COUNT} videos, {COUNT} captions" in text
        assert "annotations:   retrieval.json, sha256" in text
        assert "pooling:       over all kept tokens" in text
        assert "the best 3 of each query" in text
        assert "same first place as dense, by matching:" in text

    @pytest.mark.slow
    def test_json(self, shell: Command, folder: Path) -> None:
        model = folder / "umt-shapes.compressed.safetensors"
        found = parsed(shell("eval", model, *own(folder), "--compare-dense", "--json", "--workers", 1))
        assert set(found) >= RETRIEVAL_KEYS | {"dense", "agreement"}
        assert (found["task"], found["videos"], found["captions"]) == ("retrieval", COUNT, COUNT)
        assert (found["scoring"], found["rerank_k"], found["pooling"]) == ("matching", 128, "all")
        assert set(found["text_to_video"]) >= {"r1", "r5", "r10", "median_rank", "mean_rank"}
        assert found["gmacs"] < found["dense"]["gmacs"]
        assert found["memory"].pop("text_bytes") > 0
        assert found["memory"] == {"token_bytes": COUNT * (24 + 48) * 64 * 4, "where": "memory"}
        assert found["annotations"]["file"] == "retrieval.json"
        # every candidate is matched, so each list is the whole gallery in another order
        assert found["text_to_video"]["r10"] == 100.0

    def test_the_dense_view_is_the_dense_model_pooled_alike(self, cli: Command, folder: Path) -> None:
        both = parsed(
            cli("eval", folder / "umt-shapes.compressed.safetensors", *own(folder), "--compare-dense", "--json")
        )
        alone = parsed(cli("eval", folder / "umt-shapes.safetensors", *own(folder), "--pooling", "all", "--json"))
        assert {key: alone[key] for key in ("vtc", "text_to_video", "video_to_text", "tokens", "gmacs")} == {
            key: both["dense"][key] for key in ("vtc", "text_to_video", "video_to_text", "tokens", "gmacs")
        }
        assert alone["pooling"] == "all"
        assert "dense" not in alone

    def test_without_reranking_the_similarity_decides(self, cli: Command, folder: Path) -> None:
        arguments = ("eval", folder / "umt-shapes.safetensors", "--dataset", "builtin:shapes", "--limit", 9, "--json")
        with_it, without = parsed(cli(*arguments)), parsed(cli(*arguments, "--no-rerank"))
        assert (without["scoring"], without["rerank_k"], without["videos"]) == ("vtc", None, 9)
        assert without["memory"] == {"token_bytes": 0, "where": None, "text_bytes": 0}
        assert without["text_to_video"] == without["vtc"]["text_to_video"] == with_it["vtc"]["text_to_video"]
        assert without["pooling"] == "frames"
        text = "\n".join(lines_of(cli(*arguments[:-1], "--no-rerank")))
        assert "matching  " not in text
        assert "pooling:       over each frame" in text

    @pytest.mark.slow
    def test_unreadable_missing_and_short_videos(
        self, shell: Command, cli: Command, folder: Path, tmp_path: Path
    ) -> None:
        videos = tmp_path / "v"
        videos.mkdir()
        for index in range(COUNT):
            (videos / f"{index:05d}.mp4").write_bytes((folder / "videos" / f"{index:05d}.mp4").read_bytes())
        (videos / "00001.mp4").write_text("no video at all")
        write_audio(videos / "00002.mp4")
        (videos / "00003.mp4").unlink()
        _shape_videos.write_clip(np.zeros((2, 32, 32, 3), np.uint8), videos / "00004.mp4")
        arguments = (
            *("eval", folder / "umt-shapes.safetensors", "--annotations", folder / "retrieval.json"),
            *("--videos", videos, "--json"),
        )
        done = shell(*arguments)
        found = parsed(done)
        assert (found["videos"], found["captions"], found["captions_left_out"]) == (3, 3, 2)
        assert (found["skipped"], found["missing"], found["padded"]) == (2, 1, 1)
        reasons = {Path(entry["file"]).name: entry["reason"] for entry in found["skipped_files"]}
        assert reasons["00001.mp4"].startswith("no video in a known format")
        assert reasons["00002.mp4"] == "it has no video stream"
        assert found["missing_videos"] == ["00003.mp4"]
        assert Path(found["padded_files"][0]).name == "00004.mp4"
        for part in ("00001.mp4: no video", "00002.mp4: it has no video", "1 videos of the annotations are missing"):
            assert part in done.stderr
        assert "shorter than a clip" in done.stderr
        stopped = cli(*arguments, "--strict")
        assert stopped.rc == 4
        assert json.loads(stopped.stdout)["exit_code"] == 4
        assert "00003.mp4" in stopped.stderr
        _shape_videos.write_clip(np.zeros((4, 32, 32, 3), np.uint8), videos / "00003.mp4")
        stopped = cli(*arguments, "--strict")
        assert stopped.rc == 4
        assert "00001.mp4 cannot be read: no video" in stopped.stderr


class TestAnswering:
    def test_table(self, cli: Command, folder: Path) -> None:
        model = folder / "umt-shapes-qa.compressed.safetensors"
        answers = ("--answers", folder / "answers.json")
        lines = lines_of(cli("eval", model, *own(folder, "qa.json"), *answers, "--compare-dense"))
        text = "\n".join(lines)
        assert [line.split()[0] for line in lines if " - " in line] == ["compressed", "dense"]
        for part in ("accuracy %", "95% interval", "questions/s", f"qa, {2 * COUNT} questions", "21 answers"):
            assert part in text
        assert "same answer as dense:" in text

    def test_json(self, cli: Command, folder: Path) -> None:
        model = folder / "umt-shapes-qa.safetensors"
        found = parsed(cli("eval", model, *own(folder, "qa.json"), "--answers", folder / "answers.json", "--json"))
        assert set(found) >= QA_KEYS
        assert (found["task"], found["questions"], found["videos"]) == ("qa", 2 * COUNT, COUNT)
        assert (found["answers"], found["unanswerable"]) == (21, 0)
        low, high = found["accuracy_interval"]
        assert low <= found["accuracy"] <= high

    def test_a_right_answer_outside_the_list(self, cli: Command, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "few.json").write_text('["red", "left"]')
        model, rows = folder / "umt-shapes-qa.safetensors", json.loads((folder / "qa.json").read_text())
        found = parsed(
            cli("eval", model, *own(folder, "qa.json"), "--answers", tmp_path / "few.json", "--batch-size", 1, "--json")
        )
        assert found["unanswerable"] == sum(row["answer"] not in ("red", "left") for row in rows)

    def test_builtin_questions(self, cli: Command, folder: Path) -> None:
        model = folder / "umt-shapes-qa.safetensors"
        found = parsed(cli("eval", model, "--dataset", "builtin:shapes-qa", "--limit", 7, "--json"))
        assert (found["questions"], found["videos"], found["dataset"]) == (7, 4, "builtin:shapes-qa")


class TestRefused:
    @pytest.mark.parametrize(
        ("model", "arguments", "message"),
        [
            ("", ["--dataset", "builtin:shapes-qa"], "for retrieval, but builtin:shapes-qa holds questions"),
            ("-qa", ["--dataset", "builtin:shapes"], "for question answering, but builtin:shapes holds captions"),
            ("", ["--dataset", "imagenet-val"], "not a dataset of videos with texts"),
            ("", ["--dataset", "builtin:shapes", "--compare-dense"], "is a dense model"),
            ("", ["--dataset", "builtin:shapes", "--answers", "a.json"], "--answers is not used by builtin:shapes"),
            ("", ["--dataset", "builtin:shapes", "--rerank-k", "3", "--no-rerank"], "contradicts --no-rerank"),
            ("", ["--dataset", "builtin:shapes", "--frames", "7"], "clips of 3 frames"),
            ("-qa", ["--dataset", "builtin:shapes-qa", "--rerank"], "--rerank is not used by"),
            ("-qa", ["--dataset", "builtin:shapes-qa", "--pooling", "all"], "does not pool"),
            (".compressed", ["--dataset", "builtin:shapes", "--pooling", "frames"], "no whole frames"),
            ("", [], "no dataset given for"),
            ("", ["--annotations", "a.json"], "neither a benchmark nor annotations with videos"),
        ],
    )
    def test_invalid_combinations(
        self, cli: Command, folder: Path, model: str, arguments: list[str], message: str
    ) -> None:
        done = cli("eval", folder / f"umt-shapes{model}.safetensors", *arguments)
        assert (done.rc, done.stdout) == (2, ""), done.stderr
        assert message in done.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--dataset", "msrvtt"], "takes images, but msrvtt is a dataset of videos"),
            (["--annotations", "a.json", "--videos", "v"], "--annotations is not used by"),
            (["--no-rerank"], "--rerank is not used by"),
            (["--frames", "3"], "takes single images"),
        ],
    )
    def test_videos_for_a_model_of_images(self, cli: Command, arguments: list[str], message: str) -> None:
        done = cli("eval", "builtin:vit-digits", *arguments)
        assert (done.rc, done.stdout) == (2, "")
        assert message in done.stderr

    def test_questions_for_retrieval(self, cli: Command, folder: Path) -> None:
        done = cli("eval", folder / "umt-shapes.safetensors", *own(folder, "qa.json"))
        assert done.rc == 2
        assert "qa.json holds questions" in done.stderr

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"caption": None, "captions": "x"}, "row 1 (counted from 0): there is no 'caption', but 'captions'"),
            ({"caption": 3}, "row 1 (counted from 0): 'caption' is a number, not a text"),
            ({"video": "../secret.mp4"}, "row 1 (counted from 0)"),
        ],
    )
    def test_rows_of_another_form(
        self, cli: Command, folder: Path, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        rows = changed(folder, tmp_path / "rows.json", **change)
        done = cli(
            "eval", folder / "umt-shapes.safetensors", "--annotations", rows, "--videos", folder / "videos", "--json"
        )
        assert done.rc == 4
        assert message in done.stderr
        assert message in json.loads(done.stdout)["error"]["message"]

    def test_a_vocabulary_that_does_not_fit(self, cli: Command, folder: Path, tmp_path: Path) -> None:
        model = folder / "umt-shapes.safetensors"
        (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nred\n")
        done = cli("eval", model, *own(folder), "--vocab", tmp_path / "vocab.txt")
        assert (done.rc, done.stdout) == (4, "")
        assert "has 5 tokens, but umt-shapes was trained with 40" in done.stderr
        done = cli("eval", model, *own(folder), "--vocab", folder / "qa.json")
        assert done.rc == 4
        assert "is not a vocabulary of BERT" in done.stderr

    def test_a_folder_without_the_videos(self, cli: Command, folder: Path, tmp_path: Path) -> None:
        done = cli(
            *("eval", folder / "umt-shapes.safetensors"),
            *("--annotations", folder / "retrieval.json", "--videos", tmp_path),
        )
        assert (done.rc, done.stdout) == (4, "")
        assert f"none of the {COUNT} videos" in done.stderr


def write_audio(path: Path) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
