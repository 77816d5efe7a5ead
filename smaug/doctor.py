"""What this machine can do, and what `--fast` would choose here and why: `python -m smaug.doctor [--json -|FILE]`.

Every line is ok, a note (a run can start, but look) or a problem (`python -m smaug.train` cannot start), with what to
do. The exit code is 1 if there is a problem. No network is used, so whether the Hugging Face Hub answers is not told.

Whatever a machine is like, this has to end with a report. So only the standard library is imported at the top; a probe
that fails is a note with the error's own words; and decoders, whose C libraries can take a process with them, are tried
in processes of their own.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import smaug

if TYPE_CHECKING:
    from packaging.requirements import Requirement

CHECKOUT = Path(__file__).resolve().parents[1]  # or site-packages
CGROUP, PROC, NVIDIA = Path("/sys/fs/cgroup"), Path("/proc"), Path("/dev/nvidiactl")
GIB = 2**30
PATIENCE = 20.0  # seconds for the decoders' processes; the first import after a start of the machine is slow
COMPARED = 64  # clips of a built data set that are compared with their checksums
TINY_BYTES = 2 * GIB  # a run of size tiny on a processor has peaked at 0.9 GiB
CLIP_BYTES = 20_000  # of one encoded clip of `shapes`, 19 KB as a mean, and its line
CODECS = {  # FFmpeg's name -> who encodes the clip that is then decoded
    "h264": "libx264", "hevc": "libx265", "vp8": "libvpx", "vp9": "libvpx-vp9", "av1": "libsvtav1", "mpeg4": "mpeg4",
    "mjpeg": "mjpeg",
}  # fmt: skip
FOR = {  # extra -> what it is for
    "dali": "decodes video on a GPU",
    "torchcodec": "a second opinion on decoding; needs the system's FFmpeg",
    "peers": "what benchmarks compare with",
    "hub": "models for Hugging Face",
    "search": "python -m smaug.search",
    "plots": "pictures of python -m smaug.visualise, .estimate and .report",
    "energy": "what a GPU consumes, and its driver's version",
    "test": "runs the tests",
    "browser": "tests the search page in a browser",
    "dev": "work on smaug itself",
}
Facts = dict[str, Any]
State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    name: str
    state: State
    said: str
    do: str = ""  # a command, or a sentence


def install(extra: str = "") -> str:
    """The line that installs smaug with this extra."""
    extra = f"[{extra}]" if extra else ""
    checkout = (CHECKOUT / "constraints.txt").exists()
    return f"pip install -c constraints.txt -e '.{extra}'" if checkout else f"pip install 'smaug{extra}'"


def start(facts: Facts) -> Iterator[Finding]:
    facts |= {"smaug": smaug.__version__, "python": platform.python_version(), "platform": platform.platform()}
    try:
        importlib.import_module("smaug.train")
    except Exception as error:  # whatever a broken package raises, no run can start
        yield Finding("smaug", "problem", f"smaug.train cannot be imported: {_words(error)}", install())
    else:
        yield Finding("smaug", "ok", f"{smaug.__version__}, Python {platform.python_version()}, {platform.system()}")


def packages(facts: Facts) -> Iterator[Finding]:
    asked = requirements()
    facts["packages"], facts["extras"] = {}, {}
    for extra, wanted in asked.items():
        found: list[str] = []
        lacking: list[str] = []
        for one in wanted:
            version = facts["packages"][one.name] = _version(one.name)
            good = version is not None and one.specifier.contains(version, prereleases=True)
            (found if good else lacking).append(f"{one.name} {version}" if version else one.name)
        if extra:
            facts["extras"][extra] = {"missing": lacking, "for": FOR.get(extra, "")}
        else:
            yield Finding("packages", "ok", ", ".join(found))
        if lacking:
            name, what = (f"[{extra}]", f"{FOR.get(extra, extra)}. ") if extra else ("packages", "")
            yield Finding(name, "note", f"{what}Missing or of another version: {', '.join(lacking)}", install(extra))
    whole = [f"[{extra}]" for extra, of in facts["extras"].items() if not of["missing"]]
    yield Finding("extras", "ok", f"installed: {', '.join(whole) or 'none'}")
    if (CHECKOUT / "pyproject.toml").exists():
        project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
        if project["name"] == "smaug" and (new := project["optional-dependencies"].keys() ^ asked.keys() - {""}):
            said = f"pip knows another smaug than pyproject.toml here; they differ in {', '.join(sorted(new))}"
            yield Finding("install", "note", said, install())


def requirements() -> dict[str, list[Requirement]]:
    """What the installed smaug asks for on this platform, by extra; "" is for always."""
    from packaging.requirements import Requirement

    extras = metadata.metadata("smaug").get_all("Provides-Extra") or []
    asked: dict[str, list[Requirement]] = {name: [] for name in ("", *extras)}
    for one in map(Requirement, metadata.requires("smaug") or ()):
        fits = (name for name in asked if one.marker is None or one.marker.evaluate({"extra": name}))
        if one.name != "smaug" and (name := next(fits, None)) is not None:
            asked[name].append(one)
    return asked


def processor(facts: Facts) -> Iterator[Finding]:
    import torch

    from smaug import device

    allowed = len(os.sched_getaffinity(0))
    quotas = [*_limits("cpu", "cpu.max"), *_limits("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    usable = min([float(allowed), *(int(q) / int(period) for q, period in quotas if q not in ("max", "-1"))])
    threads, whole = torch.get_num_threads(), max(1, int(usable))
    facts["processor"] = {
        "is": device.describe(torch.device("cpu")), "cores": os.cpu_count(), "allowed": allowed, "usable": usable,
        "threads": threads, "bf16": device.choose(True, "cpu").dtype is torch.bfloat16,
    }  # fmt: skip
    model = facts["processor"]["is"].partition(",")[0]
    said = f"{model}: {usable:g} of {os.cpu_count()} cores may be used, and torch takes {threads}"
    do = ""
    if threads > whole:
        said += ", whose threads then wait for each other"
        do = f"export OMP_NUM_THREADS={whole}" + (f", and add --data.workers {whole}" if allowed > whole else "")
    elif threads < whole and "OMP_NUM_THREADS" in os.environ:
        said += f", as OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} says"
        do = "unset OMP_NUM_THREADS, unless something else needs the other cores"
    yield Finding("processor", "note" if do else "ok", said, do)


def memory(facts: Facts) -> Iterator[Finding]:
    lines = (PROC / "meminfo").read_text().splitlines()
    here = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    total, free = here["MemTotal"], here["MemAvailable"]
    words = [*_limits("memory", "memory.max"), *_limits("memory", "memory.limit_in_bytes")]
    limit = min([int(word) for (word,) in words if word != "max" and int(word) < total], default=None)
    facts["memory"] = {"bytes": total, "free_bytes": free, "limit_bytes": limit}
    said = f"{total / GIB:.1f} GiB, {free / GIB:.1f} free" + (f"; limited to {limit / GIB:.1f} GiB" if limit else "")
    few = min(free, limit or free) < TINY_BYTES
    yield Finding("memory", "note" if few else "ok", said, "a smaller --data.batch, or --micro-batch" if few else "")


def _limits(controller: str, *names: str) -> Iterator[list[str]]:
    """The words in these files, of the control group of this process and of each one above it. In a container its own
    group is often seen as the top, whatever path the kernel gives."""
    for line in (PROC / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = CGROUP / (controller if controllers else "")  # version 2 has all controllers in one tree
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and all((folder / name).exists() for name in names):
                yield [word for name in names for word in (folder / name).read_text().split()]


def gpu(facts: Facts) -> Iterator[Finding]:
    import torch

    cuda, hip = torch.version.cuda, torch.version.hip
    facts["torch"] = {"version": torch.__version__, "cuda": cuda, "hip": hip}
    facts["driver"] = {"version": None, "cuda": None, "told_by": None}
    facts["gpus"] = []
    build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "processors alone"
    yield Finding("torch", "ok", f"{torch.__version__}, for {build}")
    seen, said = _driver(facts["driver"])
    yield Finding("driver", "note" if seen and not facts["driver"]["version"] else "ok", said)
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(number)
        capability, bf16 = f"{card.major}.{card.minor}", card.major >= 8
        free, total = torch.cuda.mem_get_info(number)
        about = {"name": card.name, "bytes": total, "free_bytes": free, "capability": capability, "bf16": bf16}
        facts["gpus"].append(about)
        said = f"{card.name}, {total / GIB:.0f} GiB, {free / GIB:.0f} free, compute capability {capability}"
        said += ", bf16" if bf16 else ": bf16, which --fast takes, is emulated"
        yield Finding(f"gpu {number}", "ok" if bf16 else "note", said, "" if bf16 else "leave out --fast")
    if len(facts["gpus"]) > 1 and (free := shutil.disk_usage("/dev/shm").free) < GIB:  # Docker gives 64 MiB
        said = f"/dev/shm, through which processes on several GPUs talk, has {free / 2**20:.0f} MiB free"
        yield Finding("gpus", "note", said, "docker run --shm-size=8g")
    if facts["gpus"]:
        return
    if not seen:
        yield Finding("gpu", "ok", "none: runs compute on the processor")
    elif not (cuda or hip):
        version = torch.__version__.partition("+")[0]
        do = f"pip install --force-reinstall torch=={version}"
        yield Finding("gpu", "note", "this machine has an NVIDIA GPU, and this torch is a build without CUDA", do)
    else:
        why = f"it finds none; CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES')!r}"
        try:
            torch.cuda.init()
        except RuntimeError as error:
            why = _words(error)
        yield Finding("gpu", "note", f"there is one, but torch cannot use it: {why}", "nvidia-smi, and a newer driver")


def _driver(facts: Facts) -> tuple[bool, str]:
    """Whether there is an NVIDIA driver or device, and what is known of it."""
    module = PROC / "driver/nvidia/version"
    seen = module.exists() or NVIDIA.exists()
    try:
        import pynvml

        pynvml.nvmlInit()
        version, number = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlSystemGetCudaDriverVersion_v2()
        pynvml.nvmlShutdown()
    except Exception as error:  # NVML's own, whose type is in the module that may be missing
        if module.exists() and (found := re.search(r" (\d+\.[.\d]+) ", module.read_text())):
            facts |= {"version": found[1], "told_by": str(module)}
        is_a = f"NVIDIA {facts['version'] or 'of an unknown version'}" if seen else "no NVIDIA driver"
        return seen, f"{is_a} ({_words(error)})"
    facts |= {"version": version, "cuda": f"{number // 1000}.{number % 1000 // 10}", "told_by": "NVML"}
    return True, f"NVIDIA {version}, up to CUDA {facts['cuda']}"


def choices(facts: Facts) -> Iterator[Finding]:
    from smaug import device
    from smaug.ops.implementation import load_kernels

    for name, fast in (("fast", True), ("plain", False)):
        way = device.choose(fast)
        compiled = fast and way.device.type == "cuda"
        dtype = str(way.dtype).removeprefix("torch.")
        facts[name] = {"device": way.device.type, "dtype": dtype, "impl": way.impl, "why": way.why, "compile": compiled}
        blocks = f"blocks {'' if compiled else 'not '}compiled (--compile auto: with --fast on a GPU)"
        yield Finding("--fast" if fast else name, "ok", f"{way.device.type}: {way.why}; {blocks}")
    cuda, status = facts["fast"]["device"] == "cuda", load_kernels()
    # Inductor's rule for C++, and Triton's for C.
    cxx, cc = os.environ.get("CXX", "g++"), os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    facts["triton"], facts["compilers"] = status, {"c++": shutil.which(cxx), "c": cc and shutil.which(cc)}
    if cuda and status != "ok":
        yield Finding("triton", "note", status, install())
    elif cuda and not facts["compilers"]["c"]:
        yield Finding("triton", "problem", "it needs a C compiler to start a kernel", "apt-get install gcc")
    else:
        yield Finding("triton", "ok", "usable" if status == "ok" else f"not used: {status}")
    if facts["compilers"]["c++"]:
        yield Finding("compiler", "ok", f"{facts['compilers']['c++']}, for --compile yes on a processor")
    else:
        yield Finding("compiler", "note", f"no {cxx}, which --compile yes needs on a processor", "apt-get install g++")


def rates(facts: Facts) -> Iterator[Finding]:
    from smaug import device

    way = device.choose(True)
    try:
        products, copies = device.matrix_rate(way), device.copy_rate(way.device)
    except RuntimeError as error:  # torch's, where a GPU does not do what it says
        do = "add --device cpu, or free the GPU"
        yield Finding("measured", "problem", f"{way.device.type} cannot compute: {_words(error)}", do)
        return
    facts["measured"] = {"matrix_flops": products, "copy_bytes_per_second": copies, "device": way.device.type}
    said = f"{products / 1e12:.3g} TFLOP/s in a product of matrices, {copies / 1e9:.3g} GB/s read and written in a copy"
    yield Finding("measured", "ok", f"here and now: {said}")


def decoders(facts: Facts, tried: dict[str, subprocess.Popen[str]]) -> Iterator[Finding]:
    until = time.monotonic() + PATIENCE  # for all of them together
    facts["decoders"] = {choice: _told(choice, process, until) for choice, process in tried.items()}
    for choice, told in facts["decoders"].items():
        why, _, do = told["error"].partition("; run: ")
        by = "auto is dali, as there is a GPU, else pyav; it " if "dali" in told["name"] else "auto is pyav; it "
        by = by if choice == "auto" else ""
        failed: dict[str, list[str]] = {}  # reason -> codecs
        for codec, reason in told["codecs"].items():
            failed.setdefault(reason.replace(codec, "it"), []).append(codec)
        reads = failed.pop("", [])
        said = why or f"{by}decodes {', '.join(reads) or 'nothing'}"
        said += "".join(f"; not {', '.join(codecs)}: {reason}" for reason, codecs in failed.items())
        if choice == "auto":
            do = "" if reads else "add --data.decoder pyav"
            yield Finding("decoder", "problem" if not reads else "note" if failed else "ok", said, do)
        else:
            yield Finding(choice, "ok" if reads else "note", said, do)


def try_decoder(choice: str) -> subprocess.Popen[str]:
    """`decode_all` in a process of its own."""
    code = f"from smaug import doctor; doctor.decode_all({choice!r})"
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, cwd=CHECKOUT)


def _told(choice: str, process: subprocess.Popen[str], until: float) -> Facts:
    """What it printed, or how it ended."""
    try:
        out, err = process.communicate(timeout=max(0.5, until - time.monotonic()))  # 0.5: it may be done
    except subprocess.TimeoutExpired:
        error = f"no answer in {PATIENCE:.0f} s"
    else:
        if process.returncode == 0:
            told: Facts = json.loads(out.splitlines()[-1])
            return told
        last = (err.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        error = f"its process died of {signal.Signals(-process.returncode).name}" if process.returncode < 0 else last
    return {"name": choice, "error": error, "codecs": {}}


def decode_all(choice: Any) -> None:
    """Prints as JSON what this decoder, on the device of a run, makes of a clip of each codec: "" or why not."""
    import torch

    from smaug.data.decode import Want, open_decoder

    error, codecs, name = "", {}, choice
    try:
        decoder = open_decoder(choice, torch.device("cuda" if torch.cuda.is_available() else "cpu"), 1, PATIENCE / 2)
        name = decoder.name
    except ValueError as refused:
        error = str(refused)
    for codec, encoder in CODECS.items() if not error else ():
        try:
            clip = _clip(encoder)
        except (ValueError, OSError) as failed:  # PyAV's; ValueError: it has no such encoder
            codecs[codec] = f"untried, since PyAV cannot encode by {encoder} here ({failed})"
            continue
        (got,) = decoder.decode([Want(clip, "video", lambda times: [0, len(times) - 1])], 64)
        codecs[codec] = got.reason
        if got.frames is not None:
            levels = got.frames.float().mean((1, 2, 3))
            if (levels - torch.tensor([40.0, 180.0], device=levels.device)).abs().max() > 12:
                codecs[codec] = f"wrong frames: levels {levels.tolist()} in place of 40 and 180"
    print(json.dumps({"name": name, "error": error, "codecs": codecs}))


def _clip(encoder: str) -> bytes:
    """Eight gray frames, each 20 levels brighter than the last. 256 pixels: hardware refuses much smaller ones."""
    import av
    import numpy as np

    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream: Any = container.add_stream(encoder, rate=8)
        stream.width = stream.height = 256
        stream.pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
        for level in range(40, 200, 20):
            frame = av.VideoFrame.from_ndarray(np.full((256, 256, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def cache(facts: Facts) -> Iterator[Finding]:
    from smaug.data import shapes
    from smaug.data.clips import DataConfig
    from smaug.model.video_encoder import VideoEncoderConfig

    folder, clips, side = shapes.cache_folder().absolute(), DataConfig().shapes, VideoEncoderConfig().image_size
    there = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    free, refused = shutil.disk_usage(there).free, ""
    places: list[Path] = []
    sets: dict[str, Any] = {}
    size = 0
    try:
        places = sorted(folder.iterdir()) if folder.is_dir() else []
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(2**16))
    except OSError as error:
        refused = f"; nothing can be kept there: {error.strerror or error}"
    for place in places:
        inside = sum(path.stat().st_size for path in (place, *place.rglob("*")) if path.is_file())
        size += inside
        if place.name.startswith("shapes-v"):
            sets[place.name] = {"bytes": inside, "damaged": _damaged(place)}
    facts["cache"] = {"folder": str(folder), "bytes": size, "free_bytes": free, "writable": not refused, "sets": sets}
    built = f"shapes-v{shapes.VERSION}-{'-'.join(map(str, clips))}"
    lacking = 0 if built in sets else sum(clips) * CLIP_BYTES
    for split, count in zip(shapes.SPLITS, clips, strict=True):
        if split != "val" and not os.path.exists(folder / built / f"frames-{side}-{split}.u8"):
            lacking += count * shapes.FRAMES * side**2 * 3
    said = f"{folder}: {size / GIB:.1f} GiB in it, {free / GIB:.1f} GiB free on its disk{refused}"
    if lacking and (refused or free < lacking):
        said += f". The embedded data set needs {lacking / GIB:.1f} GiB more"
        yield Finding("cache", "problem", said, "export SMAUG_CACHE=FOLDER with room, or name data by --data.manifest")
    else:
        yield Finding("cache", "note" if refused else "ok", said)
    for name, found in sets.items():
        if found["damaged"]:
            needed = name == built and (lacking or "jsonl" in found["damaged"])  # else all is read from the maps
            said = f"{name} is damaged: {found['damaged']}"
            yield Finding("data set", "problem" if needed else "note", said, f"rm -r {folder / name}")
        else:
            yield Finding("data set", "ok", f"{name}: {found['bytes'] / 2**20:.0f} MiB, not damaged")
    if built not in sets:
        yield Finding("data set", "ok", f"{built} is not there; a run without --data.manifest makes it")


def _damaged(folder: Path) -> str:
    """What is wrong with a built data set, as far as the presence of every file and the sums of COMPARED clips tell.
    A run looks at all that it reads, and makes a damaged map of frames anew."""
    sums = folder / "checksums.json"
    if not sums.exists():
        return "it has no checksums.json"
    checksums: dict[str, int] = json.loads(sums.read_text())
    for name in (*checksums, "train.jsonl", "val.jsonl", "test.jsonl"):
        if not (folder / name).is_file():
            return f"{name} is gone"
    for name in list(checksums)[:: math.ceil(len(checksums) / COMPARED)]:
        if zlib.crc32((folder / name).read_bytes()) != checksums[name]:
            return f"{name} is not what its checksum says"
    return ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package it is in
        return False


def _words(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def examine() -> tuple[list[Finding], Facts]:
    """All findings, in the order of the table, and what they are based on; a fact that is not known is null."""
    keys = ("smaug", "python", "platform", "processor", "memory", "torch", "driver", "gpus", "fast", "plain", "triton")
    more = ("compilers", "decoders", "measured", "cache", "packages", "extras")
    facts: Facts = dict.fromkeys((*keys, *more))
    findings: list[Finding] = []
    tried: dict[str, subprocess.Popen[str]] = {}

    def begin(_: Facts) -> Iterator[Finding]:
        also = [one for one, module in (("dali", "nvidia.dali"), ("torchcodec", "torchcodec")) if _found(module)]
        also += ["pyav"] if NVIDIA.exists() else []  # without a GPU that is what auto is
        tried.update({one: try_decoder(one) for one in ("auto", *also)})
        return iter(())

    probes: dict[str, Callable[[Facts], Iterator[Finding]]] = {
        "processes": begin, "smaug": start, "processor": processor, "memory": memory, "gpu": gpu, "choices": choices,
        "decoders": lambda facts: decoders(facts, tried), "measured": rates, "cache": cache, "packages": packages,
    }  # fmt: skip
    try:
        for name, probe in probes.items():
            try:
                findings.extend(probe(facts))
            except Exception as error:  # a machine may be strange in any way; the other probes go on
                findings.append(Finding(name, "note", f"cannot be told here: {_words(error)}"))
    finally:
        for process in tried.values():
            process.kill()  # one that hangs, or all at Ctrl-C
    return findings, facts


def show(findings: list[Finding], verdict: str) -> None:
    marks = {"ok": "green", "note": "yellow", "problem": "red"}
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:  # then the table is the least of what is missing
        for one in findings:
            print(f"{one.state:<8}{one.name}: {one.said}" + (f"\n        -> {one.do}" if one.do else ""))
        print(verdict)
        return
    table = Table.grid(padding=(0, 1))
    for one in findings:
        said = Text(one.said)
        if one.do:
            said.append(f"\n-> {one.do}", "bold")
        table.add_row(Text(one.name), Text(one.state, marks[one.state]), said)
    console = Console()
    console.print(table)
    console.print(verdict, markup=False, highlight=False, soft_wrap=True)


def main() -> int:
    # argparse: tyro may be what is missing
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m smaug.doctor", description=__doc__, formatter_class=form)
    parser.add_argument(
        "--json", metavar="FILE", help="write all of it there, too; - is stdout, with nothing else on it"
    )
    to = parser.parse_args().json
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of is in the findings
            findings, facts = examine()
        problems = [one.name for one in findings if one.state == "problem"]
        verdict = f"No run can start here before this is mended: {', '.join(problems)}."
        if not problems:
            verdict = "A run can start: python -m smaug.train --fast"
        report = {"version": 1, "can_start": not problems, "findings": [asdict(one) for one in findings], **facts}
        text = json.dumps(report, indent=1) + "\n"
        if to == "-":
            sys.stdout.write(text)
        else:
            show(findings, verdict)
        if to not in (None, "-"):
            try:
                Path(to).write_text(text)
            except OSError as error:
                print(f"smaug: {to} cannot be written: {error.strerror or error}", file=sys.stderr)
                return 1
        return int(bool(problems))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    faulthandler.enable()  # should torch take this process with it, that says where
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # of a folder's name
    sys.exit(main())
