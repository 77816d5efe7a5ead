import importlib.util
import json
import resource
import sys

import pytest

from smaug.report import __main__ as command


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    def run(*arguments):
        """-> exit code, stdout, stderr."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["smaug.report", *map(str, arguments)])
        code = command.main()
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def test_the_page_the_table_and_the_numbers(call, write_run, tmp_path):
    a, b = write_run("a", scores=(0.1, 0.2, 0.4)), write_run("b", scores=(0.1, 0.2, 0.3), pace=90.0)
    code, out, err = call(a, "--baseline", b, "--json", "n.json", "--out", "r.html")
    assert code == 0 and err == ""
    assert "a reached R@1 = 30.0% on shapes val in 0.025 device-hours" in " ".join(out.split()) and "3.00x" in out
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    found = json.loads((tmp_path / "n.json").read_text())
    assert [run["name"] for run in found["runs"]] == ["a", "b"] and len(found["published"]) == 6
    [one] = found["baseline"]
    assert one["reached"] == 0.3 and one["refused"] is None and one["device_hours"]["ratio"] == pytest.approx(3)
    assert found["runs"][0]["end"]["hours"] == pytest.approx(0.03)

    code, out, err = call(a, "--baseline", b, "--json", "-", "--target", "0.35")
    assert code == 0 and json.loads(out)["baseline"][0]["device_hours"]["ratio"] is None  # and nothing but JSON
    assert not (tmp_path / "report.html").exists()
    assert call(a)[0] == 0 and (tmp_path / "report.html").exists()


def test_what_cannot_be_is_refused_in_one_line_before_the_work(call, write_run, tmp_path, monkeypatch):
    a = write_run("a")
    (tmp_path / "folder").mkdir()
    for arguments, said in {
        (): "name at least one run",
        (a, "--out", "none/r.html"): "--out none/r.html: there is no folder none",
        (a, "--json", "none/r.json"): "--json none/r.json: there is no folder none",
        (a, "--out", "folder"): "--out folder is a folder",
        (a, "--out", "r.csv"): "must end in .html",
        (a, "--target", "0.4"): "against a --baseline",
        (a, "--baseline", a, "--target", "40"): "0.4 is 40 %",
        (a.parent / "aa",): "is not there; did you mean",
    }.items():
        code, out, err = call(*arguments)
        assert (code, out, err.count("\n")) == (1, "", 1) and said in err, (arguments, err)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "plotly" else find(name, *a))
    code, out, err = call(a, "--out", "r.html")
    assert (code, out) == (1, "") and "the page needs plotly: pip install" in err
    code, out, err = call(a)
    assert code == 0 and "device-hours" in out and "the page needs plotly: pip install" in err
    assert call(a, "--json", "-")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "runs"]


def test_a_full_disk_leaves_the_old_page(call, write_run, tmp_path):
    """The limit on a file's size stands for the disk."""
    (tmp_path / "r.html").write_text("old")
    folder = write_run("a")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (99_999, limits[1]))
    try:
        code, _, err = call(folder, "--out", "r.html")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and "r.html" in err and err.count("\n") == 1
    assert (tmp_path / "r.html").read_text() == "old" and len(list(tmp_path.iterdir())) == 2
