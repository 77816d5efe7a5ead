"""The doctor on this machine, on others made of stand-ins, and on some that are broken. No GPU has been asked."""

import json
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from smaug import device, doctor
from smaug.data import clips, shapes
from smaug.ops import implementation

pytestmark = pytest.mark.filterwarnings("ignore:smaug.ops runs on PyTorch's own operations")
ROOT = Path(__file__).resolve().parents[1]
KEYS = {
    "version", "can_start", "findings", "smaug", "python", "platform", "processor", "memory", "torch", "driver", "gpus",
    "fast", "plain", "triton", "compilers", "decoders", "measured", "cache", "packages", "extras",
}  # fmt: skip
GOOD = {"name": "pyav", "error": "", "codecs": {"h264": "", "av1": ""}}


def process(code):
    return subprocess.Popen([sys.executable, "-Sc", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def look(probe, *more):
    """What a probe finds, by name, and its facts."""
    facts = {}
    found = list(probe(facts, *more))
    assert len({one.name for one in found} - {"data set"}) == len([one for one in found if one.name != "data set"])
    return {one.name: one for one in found}, facts


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """What takes seconds is not done: decoders are not tried, and the default data set is the small one."""
    monkeypatch.setattr(doctor, "try_decoder", lambda choice: process(f"print({json.dumps(GOOD)!r})"))
    monkeypatch.setattr(device, "matrix_rate", lambda way: 1.5e14)
    monkeypatch.setattr(device, "copy_rate", lambda of: 7e11)
    monkeypatch.setattr(clips, "DataConfig", lambda: SimpleNamespace(shapes=(64, 16, 16)))
    monkeypatch.setenv("SMAUG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def built(quick, shapes_cache, tmp_path):
    """The data set in a cache of its own, without the frames that other tests have decoded."""
    without = shutil.ignore_patterns("frames-*")
    return Path(shutil.copytree(shapes_cache, tmp_path / "cache", ignore=without)) / "shapes-v3-64-16-16"


def test_table_and_json_say_the_same(quick, call):
    code, out, err = call(doctor.main, "--json", "a.json")
    told = json.loads(Path("a.json").read_text())
    assert (code, err) == (0, "") and told["can_start"] and set(told) == KEYS
    words = re.sub(r"\s+", "", out)
    for one in told["findings"]:
        assert set(one) == {"name", "state", "said", "do"} and one["state"] in ("ok", "note")
        assert (
            re.sub(r"\s+", "", f"{one['name']}{one['state']}{one['said']}" + f"->{one['do']}" * bool(one["do"]))
            in words
        )
    assert out.endswith("A run can start: python -m smaug.train --fast\n")
    assert None not in told.values()
    code, out, err = call(doctor.main, "--json", "-")
    assert (code, err) == (0, "") and set(json.loads(out)) == KEYS


def test_it_reads_well_at_80_columns(quick, call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    _, out, _ = call(doctor.main)
    lines = [line.rstrip() for line in out.splitlines()]
    assert max(map(len, lines)) <= 80
    assert f"-> {doctor.install('torchcodec')}" in [line.strip() for line in lines]  # what is to be copied is one line


def test_fast_and_plain_are_what_a_run_would_take(quick):
    found, facts = look(doctor.choices)
    for name, fast in (("fast", True), ("plain", False)):
        way = device.choose(fast)
        told = facts[name]
        assert (told["device"], told["impl"], told["why"]) == (way.device.type, way.impl, way.why)
        assert getattr(torch, told["dtype"]) is way.dtype
        assert way.why in found["--fast" if fast else "plain"].said


def test_a_probe_that_fails_is_a_note_with_its_words_and_the_others_go_on(quick, call, monkeypatch):
    def broken(*args):
        raise OSError(5, "Input/output error", "/proc/meminfo\nand more")

    for probe in ("processor", "memory", "gpu", "choices", "rates", "cache", "packages"):
        monkeypatch.setattr(doctor, probe, broken)
    monkeypatch.setattr(doctor, "try_decoder", broken)
    code, out, _ = call(doctor.main, "--json", "-")
    told = json.loads(out)
    assert code == 0 and set(told) == KEYS and told["cache"] is None
    notes = [one["said"] for one in told["findings"] if one["state"] == "note"]
    assert notes == ["cannot be told here: OSError: [Errno 5] Input/output error: '/proc/meminfo\\nand more'"] * 8


def test_no_run_without_what_train_imports(quick, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "smaug.train", None)
    code, out, _ = call(doctor.main)
    assert code == 1 and "smaug.train cannot be imported: ModuleNotFoundError" in out
    assert "-> pip install -c constraints.txt -e '.'" in out
    assert out.endswith("No run can start here before this is mended: smaug.\n")


def test_without_torch_or_rich_there_is_a_report_all_the_same(tmp_path):
    """In a process of its own, where only the standard library and smaug can be imported."""
    block = "import sys; sys.modules.update(torch=None, rich=None, packaging=None); "
    code = block + "from smaug import doctor; doctor.try_decoder = None; sys.argv = ['doctor']; sys.exit(doctor.main())"
    done = subprocess.run(
        [sys.executable, "-Sc", code], capture_output=True, text=True, cwd=ROOT, env={"SMAUG_CACHE": str(tmp_path)}
    )
    assert done.returncode == 1 and done.stderr == ""
    assert re.search(r"^problem smaug: smaug.train cannot be imported: ModuleNotFoundError", done.stdout, re.M)
    assert "cannot be told here: ModuleNotFoundError: import of torch halted" in done.stdout


def test_where_json_cannot_be_written(quick, call):
    for path in ("nowhere/a.json", "."):
        code, out, err = call(doctor.main, "--json", path)
        assert code == 1 and "A run can start" in out and err.startswith(f"smaug: {path} cannot be written: ")
        assert err.count("\n") == 1


# The cache


def test_a_cache_that_is_not_there_is_not_made(quick, tmp_path):
    found, facts = look(doctor.cache)
    assert found["cache"].state == "ok" and "is not there; a run" in found["data set"].said
    assert facts["cache"]["folder"] == str(tmp_path / "cache") and not (tmp_path / "cache").exists()
    assert (facts["cache"]["bytes"], facts["cache"]["sets"]) == (0, {})


def test_what_is_in_the_cache(built):
    found, facts = look(doctor.cache)
    size = sum(path.stat().st_size for path in built.rglob("*") if path.is_file())
    assert facts["cache"]["sets"] == {built.name: {"bytes": size, "damaged": ""}}
    assert facts["cache"]["bytes"] == size and found["data set"].state == "ok"
    (built.parent / "index").write_bytes(bytes(1000))
    assert look(doctor.cache)[1]["cache"]["bytes"] == size + 1000


@pytest.mark.parametrize("where", ["file", "file/below", "/dev/full"])
def test_a_cache_nobody_can_write_to(quick, monkeypatch, tmp_path, where):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SMAUG_CACHE", str(tmp_path / where))
    found, facts = look(doctor.cache)
    assert found["cache"].state == "problem" and "nothing can be kept there: Not a directory" in found["cache"].said
    assert "SMAUG_CACHE" in found["cache"].do and facts["cache"]["writable"] is False


def test_a_cache_nobody_may_look_into(quick, monkeypatch, tmp_path):
    def locked(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(doctor.Path, "is_dir", locked)  # root, as whom tests may run, may look everywhere
    found, _ = look(doctor.cache)
    assert found["cache"].state == "problem" and "nothing can be kept there: Permission denied" in found["cache"].said


def test_a_full_and_a_read_only_disk(built, monkeypatch, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        monkeypatch.setenv("SMAUG_CACHE", str(disk))
        found, _ = look(doctor.cache)  # the clips and their frames take 17 MB
        assert found["cache"].state == "problem" and "needs 0.0 GiB more" in found["cache"].said
        (disk / "ballast").write_bytes(bytes(8 * 2**20 - 8192))
        found, _ = look(doctor.cache)
        assert found["cache"].state == "problem" and "No space left on device" in found["cache"].said
        (disk / "ballast").unlink()
        shutil.copytree(built, disk / built.name)
        for split in ("train", "test"):  # all that a run reads, by name
            (disk / built.name / f"frames-64-{split}.u8").touch()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        found, _ = look(doctor.cache)
        assert found["cache"].state == "note" and "Read-only file system" in found["cache"].said
        assert found["data set"].state == "ok"
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_damage_is_a_problem_where_a_run_would_meet_it(built):
    clip = built / "train/00000.webm"
    data = clip.read_bytes()
    clip.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    found, facts = look(doctor.cache)
    assert found["data set"].state == "problem" and found["data set"].do == f"rm -r {built}"
    assert facts["cache"]["sets"][built.name]["damaged"] == "train/00000.webm is not what its checksum says"
    with pytest.raises(shapes.DamagedError):  # as a run says it
        shapes.decoded(built, "train", 64)
    clip.write_bytes(data)
    for split in ("train", "test"):
        shapes.decoded(built, split, 64)
    (built / "val/00003.webm").unlink()
    found, facts = look(doctor.cache)
    assert found["data set"].state == "note" and "val/00003.webm is gone" in found["data set"].said
    (built / "train.jsonl").unlink()
    (built / "val/00003.webm").write_bytes(b"")
    assert look(doctor.cache)[0]["data set"].said.endswith("train.jsonl is gone")
    assert look(doctor.cache)[0]["data set"].state == "problem"
    (built / "checksums.json").unlink()
    assert look(doctor.cache)[0]["data set"].said.endswith("it has no checksums.json")


# Packages


def test_every_extra_says_what_it_is_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert doctor.FOR.keys() == project["optional-dependencies"].keys()


@pytest.fixture
def asks(monkeypatch):
    """asks(*requirements): what pip says that smaug asks for. All that is installed is of version 1.5."""

    def asks(*lines, lacks=()):
        extras = sorted({extra for line in lines for extra in re.findall(r'extra == "(\w+)"', line)})
        monkeypatch.setattr(metadata, "requires", lambda name: list(lines))
        monkeypatch.setattr(metadata, "metadata", lambda name: SimpleNamespace(get_all=lambda key: extras or None))
        monkeypatch.setattr(doctor, "_version", lambda name: None if name in lacks else "1.5")

    return asks


def test_an_extra_that_is_not_installed_comes_with_its_line(asks, monkeypatch, tmp_path):
    gone = 'winonly>=1; platform_system == "Windows" and extra == "hub"'
    lines = ["need>=1", 'one>=1; extra == "dali"', 'two; extra == "hub"', gone, 'smaug[hub]; extra == "test"']
    asks(*lines, lacks=("one", "winonly"))
    found, facts = look(doctor.packages)
    assert found["[dali]"] == doctor.Finding(
        "[dali]", "note", "decodes video on a GPU. Missing or of another version: one",
        "pip install -c constraints.txt -e '.[dali]'",
    )  # fmt: skip
    assert found["packages"].said == "need 1.5" and found["extras"].said == "installed: [hub], [test]"
    assert facts["extras"] == {
        "dali": {"missing": ["one"], "for": "decodes video on a GPU"},
        "hub": {"missing": [], "for": "models for Hugging Face"},
        "test": {"missing": [], "for": "runs the tests"},
    }
    assert facts["packages"] == {"need": "1.5", "one": None, "two": "1.5"}
    assert "browser, dev, energy" in found["install"].said and found["install"].state == "note"
    monkeypatch.setattr(doctor, "CHECKOUT", tmp_path)  # installed from a wheel
    found, _ = look(doctor.packages)
    assert found["[dali]"].do == "pip install 'smaug[dali]'" and "install" not in found


def test_a_package_of_another_version_is_told(asks):
    asks("need>=1", "old>=2,<3", "gone", lacks=("gone",))
    facts = {}
    said = [one for one in doctor.packages(facts) if one.name == "packages"]
    assert said[0].said == "need 1.5"
    assert said[1].said == "Missing or of another version: old 1.5, gone" and said[1].state == "note"


# Processor and memory


@pytest.fixture
def container(monkeypatch, tmp_path):
    """container(groups, files): /proc and /sys/fs/cgroup of another machine, of 64 cores and 8 GiB."""

    def container(groups, **files):
        monkeypatch.setattr(doctor, "PROC", tmp_path / "proc")
        monkeypatch.setattr(doctor, "CGROUP", tmp_path / "cgroup")
        files = {f"cgroup/{name.replace('__', '/').replace('_', '.', 1)}": text for name, text in files.items()}
        files |= {"proc/self/cgroup": groups, "proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 6291456 kB\n"}
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: set(range(64)))
        monkeypatch.setattr(doctor.os, "cpu_count", lambda: 64)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)

    return container


@pytest.mark.parametrize("version, cores", [("1", 1.5), ("2", 2.0), ("2, seen from outside", 2.5), ("none", 64.0)])
def test_limits_of_a_container(container, version, cores):
    if version == "1":  # the limit lies above the process's own group, and a group that it is not in has a lower quota
        container(
            "5:memory:/own\n4:cpu,cpuacct:/\n0::/\n", cpu__cpu_cfs_quota_us="150000", cpu__cpu_cfs_period_us="100000",
            cpu__own__cpu_cfs_quota_us="1000", cpu__own__cpu_cfs_period_us="100000",
            memory__own__memory_limit_in_bytes="9223372036854771712", memory__memory_limit_in_bytes="1073741824",
        )  # fmt: skip
    elif version == "2":
        container("0::/\n", cpu_max="200000 100000\n", memory_max="1073741824\n")
    elif version == "none":
        container("0::/\n", cpu_max="max 100000\n", memory_max="max\n")
    else:
        container(
            "0::/slice/own\n", slice__cpu_max="250000 100000\n", slice__own__cpu_max="max 100000\n",
            slice__own__memory_max="1073741824\n",
        )  # fmt: skip
    found, facts = look(doctor.processor)
    assert facts["processor"]["usable"] == cores and facts["processor"]["cores"] == 64
    assert f"{cores:g} of 64 cores may be used, and torch takes 64" in found["processor"].said
    limited, memory = look(doctor.memory)[0]["memory"], look(doctor.memory)[1]["memory"]
    if version == "none":
        assert found["processor"].state == limited.state == "ok" and memory["limit_bytes"] is None
        assert found["processor"].do == limited.do == ""
    else:
        few = int(cores)
        assert found["processor"].do == f"export OMP_NUM_THREADS={few}, and add --data.workers {few}"
        assert limited.state == found["processor"].state == "note" and "limited to 1.0 GiB" in limited.said
        assert memory == {"bytes": 2**33, "free_bytes": 6 * 2**30, "limit_bytes": 2**30}


def test_cores_that_a_variable_leaves_idle(container, monkeypatch):
    container("0::/\n")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found, _ = look(doctor.processor)
    assert found["processor"].said.endswith("as OMP_NUM_THREADS=1 says") and found["processor"].state == "note"
    monkeypatch.delenv("OMP_NUM_THREADS")  # torch takes a thread a core, not two
    assert look(doctor.processor)[0]["processor"].state == "ok"


def test_copy_rate_counts_what_is_read_and_written():
    clock = iter([0.0, 0.0, 0.0, 0.05, 0.05, 0.05, 0.25, 0.25])  # a copy in 0.05 s, and one in 0.2 s
    assert device.copy_rate(torch.device("cpu"), lambda: next(clock)) == 2 * 2**27 / 0.05


# Decoders


def test_every_codec_is_really_decoded(capsys):
    doctor.decode_all("auto")
    told = json.loads(capsys.readouterr().out)
    assert told["name"] == "pyav" and told["error"] == "" and told["codecs"].keys() == doctor.CODECS.keys()
    assert {reason.partition(",")[0] for reason in told["codecs"].values()} <= {"", "untried"}
    assert told["codecs"]["vp9"] == ""  # without which there are no `shapes`


@pytest.mark.parametrize("hidden", [(), ("torchcodec",), ("nvidia", "nvidia.dali", "torchcodec")])
def test_decoders_that_are_not_installed_are_not_tried(quick, monkeypatch, tmp_path, hidden):
    def find_spec(name):
        if name == "nvidia.dali" and "nvidia" in hidden:
            raise ModuleNotFoundError("No module named 'nvidia'")
        return None if name in hidden else object()

    monkeypatch.setattr(doctor.importlib.util, "find_spec", find_spec)
    there = [one for one in ("dali", "torchcodec") if not hidden or (one == "dali" and "nvidia" not in hidden)]
    assert list(doctor.examine()[1]["decoders"]) == ["auto", *there]
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path / "nvidiactl")
    assert list(doctor.examine()[1]["decoders"]) == ["auto", *there, "pyav"]


def test_wrong_frames_and_codecs_that_cannot_be_tried(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "CODECS", {"mpeg4": "mpeg4", "new": "no-such-encoder"})
    monkeypatch.setattr(doctor, "range", lambda *of: [40] * 8, raising=False)  # the clip does not get brighter
    doctor.decode_all("pyav")
    codecs = json.loads(capsys.readouterr().out)["codecs"]
    assert re.fullmatch(r"wrong frames: levels \[\d+\.\d+, \d+\.\d+\] in place of 40 and 180", codecs["mpeg4"])
    assert codecs["new"].startswith("untried, since PyAV cannot encode by no-such-encoder here")


@pytest.mark.parametrize(
    "code, error",
    [
        ("import os; os.kill(os.getpid(), 11)", "its process died of SIGSEGV"),
        ("import time; time.sleep(60)", "no answer in 0 s"),
        ("raise OSError('libavcodec.so.62 is not there')", "OSError: libavcodec.so.62 is not there"),
    ],
)
def test_a_decoder_that_takes_its_process_with_it(monkeypatch, code, error):
    monkeypatch.setattr(doctor, "PATIENCE", 0.4 if "sleep" in code else 20.0)
    tried = {"auto": process(code), "torchcodec": process(code)}
    try:
        found, facts = look(doctor.decoders, tried)
    finally:
        for one in tried.values():
            one.kill()
    assert facts["decoders"]["torchcodec"] == {"name": "torchcodec", "error": error, "codecs": {}}
    assert (found["torchcodec"].state, found["torchcodec"].said) == ("note", error)
    assert (found["decoder"].state, found["decoder"].do) == ("problem", "add --data.decoder pyav")


@pytest.mark.parametrize("code", [0, 130])
def test_no_process_is_left_behind(quick, call, monkeypatch, code):
    hangs = process("import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "PATIENCE", 0.0)
    monkeypatch.setattr(doctor, "_found", lambda module: False)
    monkeypatch.setattr(doctor, "try_decoder", lambda choice: hangs)

    def ctrl_c(facts):
        raise KeyboardInterrupt

    if code:
        monkeypatch.setattr(doctor, "processor", ctrl_c)
    assert call(doctor.main)[0] == (code or 1)  # 1: auto cannot decode
    assert hangs.wait(5) == -signal.SIGKILL


def test_one_that_hangs_takes_no_time_from_the_next(monkeypatch):
    monkeypatch.setattr(doctor, "PATIENCE", 0.0)
    tried = {"auto": process("import time; time.sleep(60)"), "torchcodec": process(f"print({json.dumps(GOOD)!r})")}
    tried["torchcodec"].wait(20)
    try:
        assert look(doctor.decoders, tried)[1]["decoders"]["torchcodec"] == GOOD
    finally:
        tried["auto"].kill()


def test_what_is_said_of_decoders():
    lacks = "torchcodec cannot be imported, for want of FFmpeg's shared libraries; run: apt install ffmpeg"
    gpu = {"h264": "", "vp8": "", "av1": "no decoder for av1", "hevc": "no decoder for hevc"}
    tried = {
        "auto": {"name": "dali, else pyav", "error": "", "codecs": gpu},
        "torchcodec": {"name": "torchcodec", "error": lacks, "codecs": {}},
    }
    found, facts = look(doctor.decoders, {one: process(f"print({json.dumps(told)!r})") for one, told in tried.items()})
    assert facts["decoders"] == tried
    assert found["decoder"].state == "note" and found["decoder"].said == (
        "auto is dali, as there is a GPU, else pyav; it decodes h264, vp8; not av1, hevc: no decoder for it"
    )
    assert found["torchcodec"].do == "apt install ffmpeg" and found["torchcodec"].state == "note"


# GPUs, which none of these tests has


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """stand_in(major=8, cards=1): a torch with CUDA, cards, and NVML."""

    def stand_in(major=8, cards=1, kernels="ok"):
        card = SimpleNamespace(name="NVIDIA RTX A6000", major=major, minor=6)
        answers = {"is_available": True, "device_count": cards, "get_device_properties": card}
        answers |= {"mem_get_info": (40 * 2**30, 48 * 2**30)}
        for name, value in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *of, value=value: value)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        for module in (implementation, device):
            monkeypatch.setattr(module, "load_kernels", lambda: kernels)
        nvml = {"nvmlInit": None, "nvmlShutdown": None, "nvmlSystemGetDriverVersion": "580.65.06"}
        nvml |= {"nvmlSystemGetCudaDriverVersion_v2": 13010}
        answers = {name: lambda value=value: value for name, value in nvml.items()}
        monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**answers))

    monkeypatch.setattr(doctor, "PROC", tmp_path)
    return stand_in


def test_a_gpu_by_stand_in(stand_in):
    stand_in()
    found, facts = look(doctor.gpu)
    assert found["gpu 0"].said == "NVIDIA RTX A6000, 48 GiB, 40 free, compute capability 8.6, bf16"
    assert found["driver"].said == "NVIDIA 580.65.06, up to CUDA 13.1" and found["torch"].said.endswith("for CUDA 13.0")
    assert facts["driver"] == {"version": "580.65.06", "cuda": "13.1", "told_by": "NVML"}
    about = {"bytes": 48 * 2**30, "free_bytes": 40 * 2**30, "capability": "8.6", "bf16": True}
    assert facts["gpus"] == [{"name": "NVIDIA RTX A6000", **about}]
    found, facts = look(doctor.choices)
    assert found["--fast"].said.startswith("cuda: bf16; Triton kernels; blocks compiled")
    assert facts["fast"]["compile"] and facts["fast"]["dtype"] == "bfloat16" and not facts["plain"]["compile"]
    assert found["triton"].said == "usable"


def test_an_old_gpu_by_stand_in(stand_in):
    stand_in(major=7, kernels="Triton needs compute capability 8.0; this has 7.6.")
    assert look(doctor.gpu)[0]["gpu 0"].state == "note"
    found, _ = look(doctor.choices)
    assert found["triton"].state == "note" and "8.0" in found["triton"].said and "plain PyTorch" in found["--fast"].said


def test_two_gpus_and_little_shared_memory_by_stand_in(stand_in, monkeypatch):
    stand_in(cards=2)
    for free, said in ((2**26, True), (2**33, False)):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        found, facts = look(doctor.gpu)
        assert ("gpus" in found) is said and len(facts["gpus"]) == 2 and "gpu 1" in found
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**26))
    assert "has 64 MiB free" in look(doctor.gpu)[0]["gpus"].said


def test_no_c_compiler_for_triton_by_stand_in(stand_in, monkeypatch):
    stand_in()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    found, facts = look(doctor.choices)
    assert found["triton"].state == "problem" and found["triton"].do == "apt-get install gcc"
    assert found["compiler"].state == "note" and facts["compilers"] == {"c++": None, "c": None}


def test_a_gpu_that_cannot_compute_by_stand_in(stand_in, quick, call, monkeypatch):
    stand_in()

    def full(way):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 MiB.\nSee documentation")

    monkeypatch.setattr(device, "matrix_rate", full)
    code, out, _ = call(doctor.main)
    assert (
        code == 1 and "cuda cannot compute: OutOfMemoryError: CUDA out of memory. Tried to allocate 256.00 MiB." in out
    )
    assert out.endswith("mended: measured.\n")


def test_rates_of_a_gpu_by_stand_in(stand_in, quick):
    stand_in()
    found, facts = look(doctor.rates)
    assert "150 TFLOP/s" in found["measured"].said and "700 GB/s" in found["measured"].said
    assert facts["measured"] == {"matrix_flops": 1.5e14, "copy_bytes_per_second": 7e11, "device": "cuda"}


DRIVER = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder)\nGCC version:\n"
)


@pytest.mark.parametrize("cuda, words", [(None, "a build without CUDA"), ("13.0", "driver on your system is too old")])
def test_a_gpu_that_torch_cannot_use_by_stand_in(monkeypatch, tmp_path, cuda, words):
    (tmp_path / "driver/nvidia").mkdir(parents=True)
    (tmp_path / "driver/nvidia/version").write_text(DRIVER)

    def old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12080).\nPlease update")

    monkeypatch.setattr(doctor, "PROC", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", old)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    found, facts = look(doctor.gpu)
    assert found["gpu"].state == "note" and words in found["gpu"].said and facts["gpus"] == []
    assert (
        found["driver"].said.startswith("NVIDIA 570.86.15 (ModuleNotFoundError")
        and facts["driver"]["version"] == "570.86.15"
    )
    if cuda is None:
        version = torch.__version__.partition("+")[0]
        assert found["gpu"].do == f"pip install --force-reinstall torch=={version}"


# As it is typed


@pytest.mark.slow
def test_this_machine(shapes_cache):
    done = subprocess.run(
        [sys.executable, "-m", "smaug.doctor", "--json", "-"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    told = json.loads(done.stdout)
    assert done.returncode == 0 and done.stderr == "" and set(told) == KEYS and None not in told.values()
    assert told["decoders"]["auto"]["codecs"]["vp9"] == "" and told["measured"]["copy_bytes_per_second"] > 1e8
    assert told["packages"]["torch"] == torch.__version__ and told["cache"]["folder"] == str(shapes_cache)
