"""Files that rot under a run: what is damaged is named, and never trained on, nor taken for whole."""

import io
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from smaug.data import shapes

pytestmark = pytest.mark.slow
SHAPES = ["--data.shapes", 64, 16, 16, "--optim.steps", 12]


def flip(path, rng):
    """One bit of one byte, anywhere."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def test_any_file_of_a_checkpoint(run, undisturbed):
    whole, begun = undisturbed(*SHAPES), undisturbed(*SHAPES, "--max-steps=6")
    rng, damaged = random.Random(3), []
    for number, name in enumerate(begun.files(6)):
        one = run(f"run{number}", *SHAPES)
        shutil.copytree(begun.folder, one.folder)
        flip(one.folder / "checkpoints/step-6" / name, rng)
        damaged.append(one)
    with ThreadPoolExecutor(2) as pool:  # one a core
        list(pool.map(lambda one: one.finish(), damaged))
    for one in damaged:
        assert re.search(r"step-6 is damaged \(.*\) and was passed over", one.said), one.said
        assert "resuming at step 4\n" in one.said
        one.equals(whole)


def test_all_checkpoints(run, undisturbed):
    """A run does not begin again by itself as if it had never been: it says what to remove for that."""
    one = run("run", *SHAPES)
    shutil.copytree(undisturbed(*SHAPES, "--max-steps=6").folder, one.folder)
    for step in (4, 6):
        flip(one.folder / f"checkpoints/step-{step}/model.safetensors", random.Random(step))
    line = one.refuse()
    assert f"no checkpoint in {one.folder / 'checkpoints'} can be read" in line and "remove that folder" in line
    shutil.rmtree(one.folder / "checkpoints")
    one.finish().equals(undisturbed(*SHAPES))


def test_the_decoded_map_and_then_its_clips(run, undisturbed, tmp_path, monkeypatch):
    """A map is made anew from the clips, and a clip that is not what was written ends the run."""
    whole, one, good = undisturbed(*SHAPES), run("run", *SHAPES), shapes.build((64, 16, 16))
    shutil.copytree(undisturbed(*SHAPES, "--max-steps=6").folder, one.folder)
    shutil.copytree(good, tmp_path / "cache" / good.name)
    monkeypatch.setenv("SMAUG_CACHE", str(tmp_path / "cache"))
    (decoded,) = (tmp_path / "cache" / good.name).glob("frames-*-train.u8")
    clip, right, rng = decoded.with_name("train") / "00011.webm", decoded.read_bytes(), random.Random(4)
    flip(decoded, rng)
    flip(clip, rng)
    assert f"{clip} is damaged; delete" in one.refuse() and one.saved() == 6
    shutil.copy(good / "train/00011.webm", clip)
    one.finish()
    assert "decoding the train clips" in one.said and decoded.read_bytes() == right
    one.equals(whole)


# ---- one's own data


@pytest.fixture(scope="module")
def clips(shapes_cache):
    """Twenty-four clips with their captions, whole."""
    folder = shapes.build((64, 16, 16))
    rows = [json.loads(line) for line in (folder / "train.jsonl").open()][:24]
    return [((folder / row["video"]).read_bytes(), row["caption"]) for row in rows]


@pytest.fixture
def lay(tmp_path, clips):
    """lay(name) -> a folder with the clips, a table of them, and one to evaluate on that nothing happens to."""

    def lay(name):
        folder = tmp_path / name
        folder.mkdir()
        for number, (data, _) in enumerate(clips):
            (folder / f"{number:02}.webm").write_bytes(data)
        table = [f"{number:02}.webm,{caption}" for number, (_, caption) in enumerate(clips)]
        (folder / "clips.csv").write_text("\n".join(["video,caption", *table]) + "\n")
        (tmp_path / "held").mkdir(exist_ok=True)
        for number in range(4):
            (tmp_path / f"held/{number}.webm").write_bytes(clips[number][0])
        rows = [f"{number}.webm,{clips[number][1]}" for number in range(4)]
        (tmp_path / "held/held.csv").write_text("\n".join(["video,caption", *rows]) + "\n")
        return folder

    return lay


def pack(folder, clips=24):
    """A shard of the folder's first clips, as webdataset lays it out."""
    captions = (folder / "clips.csv").read_text().splitlines()[1:]
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for line in captions[:clips]:
            name, _, caption = line.partition(",")
            text = tarfile.TarInfo(name.replace(".webm", ".txt"))
            text.size = len(caption)
            tar.addfile(text, io.BytesIO(caption.encode()))
            tar.add(folder / name, name)
    return folder / "00000.tar"


OWN = ["--data.batch", 8, "--optim.steps", 9, "--data.max-bad", 0.06, "--data.clip-seconds", 1, "--data.eval-manifest"]


def own(run, folder, source="clips.csv"):
    """A run on one's own data, held-out pairs apart."""
    return run(f"on {folder.name}", *OWN, folder.parent / "held/held.csv", "--data.manifest", folder / source)


HOLD = """
import fcntl, os, signal, sys, time
signal.signal(signal.SIGIO, signal.SIG_IGN)
file = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def hold():
    """hold(path): whoever opens the file waits for its owner, as on a file server that does not answer; by a lease."""
    holders = []

    def hold(path):
        holder = subprocess.Popen(
            [sys.executable, "-S", "-c", HOLD, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        holders.append(holder)
        if not holder.stdout.readline():
            pytest.skip(f"no lease on a file can be had here: {holder.communicate()[1].decode().splitlines()[-1]}")

    yield hold
    for holder in holders:
        holder.kill()
        holder.communicate()


def test_a_clip_that_hangs_or_is_damaged_is_as_one_that_never_was_one(run, lay, hold):
    """Skipped, named and replaced by the same clip, whatever is wrong with it; live or in a shard."""
    folders = {name: lay(name) for name in ("garbage", "hangs", "header", "shard")}
    (folders["garbage"] / "05.webm").write_bytes(b"not a video at all" * 50)
    hold(folders["hangs"] / "05.webm")
    data = (folders["header"] / "05.webm").read_bytes()
    (folders["header"] / "05.webm").write_bytes(random.Random(5).randbytes(512) + data[512:])
    shard = pack(folders["shard"])
    offset = shard.read_bytes().index(data)
    with open(shard, "r+b") as file:
        file.seek(offset)
        file.write(random.Random(6).randbytes(512))
    runs = {name: own(run, folder, "00000.tar" if name == "shard" else "clips.csv") for name, folder in folders.items()}
    runs["header"].start()
    runs["header"].until(lambda: runs["header"].saved() >= 4)
    runs["header"].kill()  # what it has skipped is not met again, and stays named
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda one: one.finish(), runs.values()))
    for name, one in runs.items():
        assert one.untimed() == runs["garbage"].untimed() and len(one.rows()) == 9, name
        skipped = (one.folder / "skipped.txt").read_text()
        assert skipped.count("\n") == one.result()["skipped"] == 1 and "05" in skipped, (name, skipped)
        assert name == "header" or f"skipped {skipped}" in one.said
    runs["header"].equals(runs["garbage"])
    runs["hangs"].equals(runs["garbage"])
    assert "does not come back from decoding" in runs["hangs"].said


def test_a_shard_whose_end_cannot_be_read(run, lay):
    """What lies before the damage is trained on, as if there were no more; and not if that leaves out too much."""
    short, rotten, cut, lost = (lay(name) for name in ("short", "rotten", "cut", "lost"))
    pack(short, clips=22)
    rng = random.Random(7)
    with tarfile.open(pack(rotten)) as tar:
        later, early = (tar.getmember(name).offset for name in ("22.txt", "03.txt"))
    (cut / "00000.tar").write_bytes((rotten / "00000.tar").read_bytes()[: later + 520])
    for folder, at in ((rotten, later), (lost, early)):
        data = bytearray((folder / "00000.tar").read_bytes() if folder == rotten else pack(lost).read_bytes())
        data[at + rng.randrange(100)] ^= 1 << rng.randrange(8)
        (folder / "00000.tar").write_bytes(data)
    runs = [own(run, folder, "00000.tar") for folder in (short, rotten, cut)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda one: one.finish(), runs))
    for one, said in zip(runs[1:], (f"damaged at byte {later}: no header", "truncated: "), strict=True):
        assert f"00000.tar: {said}" in one.said, one.said
        assert one.untimed() == runs[0].untimed() and one.result()["skipped"] == 1
    # of a shard of which three clips are left, one is no longer a small share
    assert f"00000.tar: damaged at byte {early}" in own(run, lost, "00000.tar").refuse()


def test_a_table_that_is_not_what_it_was(run, lay):
    """Between two starts: refused in a sentence, or gone on with and said; a caption that changed included."""
    table = lay("clips")
    begun = own(run, table).finish("--max-steps", 3)
    whole = (table / "clips.csv").read_bytes()
    damages = {
        "not text": whole[:200] + b"\xff" + whole[201:],
        "a line": whole.replace(whole.splitlines(keepends=True)[9], b""),
        "a letter": whole.replace(b"the red", b"the rad", 1),
    }
    for name, data in damages.items():
        one = run(f"run {name}", *begun.flags)
        shutil.copytree(begun.folder, one.folder)
        (table / "clips.csv").write_bytes(data)
        code = one.start("--max-steps", 4).wait()
        said = [line for line in one.said.splitlines() if re.match("smaug: |.*not what", line)]
        assert code in (0, 1) and len(said) == 1 and "Traceback" not in one.said, (name, one.said)
        print(code, said[0])
