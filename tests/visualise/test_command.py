"""The command: both files of a clip of the data or of a file, and a sentence for what cannot be shown."""

import errno
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from smaug.visualise import __main__ as command
from smaug.visualise.picture import greyed, lit


def test_a_picture_and_a_page_are_written(folders, call, clips):
    caption = clips.samples[5].captions[0]
    code, out, err = call(command.main, folders / "whole", 5)
    assert code == 0 and not err
    assert out.splitlines()[-2:] == [
        f'clip       clip 5 of shapes test, "{caption}"',
        "wrote      00005-look.png and 00005-look.html",
    ]
    with Image.open("00005-look.png") as picture:
        assert picture.format == "PNG"
        # seven rows (two blocks prune) and four columns of cells of 256 pixels, words in small, and little else
        assert 4 * 256 < picture.width < 4 * 256 + 400 and 7 * 256 < picture.height < 7 * 256 + 900
        colours = picture.convert("RGB").getcolors(1 << 22)
    assert len(colours) > 1000
    assert caption in Path("00005-look.html").read_text()
    # another text may select other moments, and is no formula
    os.mkdir("there")
    again = ["--text", "costs $_{ or \\frac$", "--out", "there", "--block", 0]
    assert call(command.main, folders / "whole", 5, *again)[0] == 0
    assert Path("there/00005-look.png").read_bytes() != Path("00005-look.png").read_bytes()
    assert sorted(os.listdir()) == ["00005-look.html", "00005-look.png", "there"]


def test_a_file_needs_a_text(folders, call, clips, tmp_path):
    clip = tmp_path / "a clip[1].webm"
    clip.write_bytes(clips.samples[5].path.read_bytes())
    Image.new("RGB", (80, 60), "red").save(tmp_path / "pic.png")
    code, out, err = call(command.main, folders / "masked", clip, "--text", "a ring", "--out", "x.html")
    assert code == 0 and out.splitlines()[0] == 'clip       a clip[1].webm, "a ring"'  # no data set was opened
    assert out.splitlines()[1:] == ["wrote      x.png and x.html"]
    code, out, _ = call(command.main, folders / "whole", "pic.png", "--text", "视频")
    # the clip stays as it is, and letters that are in no font here are said to be missing
    assert code == 0 and Image.open("pic.png").size == (80, 60) and Path("pic-look.png").exists()
    code, _, err = call(command.main, folders / "whole", "pic.png", "--text", "a", "--out", "pic")
    assert code == 1 and "pic.png is the clip itself" in err and Image.open("pic.png").size == (80, 60)
    code, _, err = call(command.main, folders / "whole", clip)
    assert code == 1 and "has no caption: say with --text" in err and err.count("\n") == 1


def test_what_cannot_be_shown_is_told_in_a_sentence(folders, call, tmp_path, monkeypatch):
    def refused(folder, *arguments):
        code, _, err = call(command.main, folder, *arguments)
        assert code == 1 and err.startswith("smaug: ") and err.count("\n") == 1, err
        assert not [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.html"), *tmp_path.rglob("*.aside")]
        return err

    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "notes.doc").write_bytes(b"no video")
    whole = folders / "whole"
    assert "holds no run" in refused(tmp_path / "nothing", 0)
    assert "shapes test has the clips 0 to 15" in refused(whole, 16)
    assert "there is no folder gone" in refused(whole, 0, "--out", "gone/clip.png")
    assert "--text is empty" in refused(whole, 0, "--text", " ")
    assert "--block 2: the fusion encoder has 2 blocks" in refused(whole, 0, "--block", 2)
    assert "broken.mp4: not a media file" in refused(whole, "broken.mp4", "--text", "a")
    assert "did you mean broken.mp4" in refused(whole, "brokem.mp4", "--text", "a")
    assert "neither video nor image" in refused(whole, "notes.doc", "--text", "a")
    assert "is a directory" in refused(whole, ".", "--text", "a")
    code, _, err = call(command.main, whole)
    assert code == 2 and "clip" in err.lower()

    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert "No space left" in refused(folders / "masked", 0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install -c constraints.txt -e '.[plots]'" in refused(whole, 0)


def test_grey_lies_over_what_is_not_there():
    images = np.full((2, 4, 4, 3), 10, dtype=np.uint8)
    there = np.array([[[True, False], [True, True]], [[False, False], [False, True]]])
    grey = greyed(images, there, 1.0)[..., 0]
    assert (grey[0, :2, 2:] == 190).all() and (grey == 190).sum() == 4 * 4 and (grey == 10).sum() == 4 * 4
    assert greyed(images, there[:, :1, :1], 0.5)[1].tolist() == np.full((4, 4, 3), 100).tolist()


def test_light_falls_where_a_word_looks():
    images = np.full((1, 4, 4, 3), 100, dtype=np.uint8)
    red = lit(images, np.array([[[0.2, 0.1], [0.0, np.nan]]]))[0, ::2, ::2, 0]
    assert red.tolist() == [[225, 142], [60, 215]]  # 0.85 of 255 and 0.15 of 60; half of that; the dark grey; pale
