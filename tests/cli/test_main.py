"""Exit statuses, errors of one line, and what each command prints."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import ranger_nn
from ranger_nn.cli.main import main
from ranger_nn.io.image import read_image, write_image
from tests.cli.models import Smooth

SMOOTH = "tests.cli.models:Smooth"
SHAPE = "1x3x40x56"
SMALL = ["--memory", "300kB", "--threads", "1"]


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "in.png"
    write_image(path, np.random.default_rng(0).integers(0, 256, (3, 61, 53), dtype=np.uint8))
    return path


def call(*arguments):
    return main([str(argument) for argument in arguments])


def error_of(capsys):
    """The one line on standard error, without progress."""
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if not line.startswith("region ")]
    assert len(lines) == 1, lines
    return lines[0]


# --------------------------------------------------------------------------------------- plan


def test_plan_prints_the_plan(capsys):
    assert call("plan", SMOOTH, SHAPE, *SMALL) == 0
    printed = capsys.readouterr()
    assert printed.out.strip()
    assert printed.err == ""


def test_plan_as_json(capsys):
    assert call("plan", SMOOTH, SHAPE, "--json", *SMALL) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["allowed"] == 300_000
    assert plan["projected"] <= 300_000


def test_plan_of_a_huge_shape_runs_nothing(capsys):
    assert call("plan", SMOOTH, "1x3x65536x65536", "--memory", "1GB") == 0


def test_plan_for_training_needs_more(capsys):
    projected = []
    for options in ([], ["--train"]):
        assert call("plan", SMOOTH, SHAPE, "--json", *options) == 0
        projected.append(json.loads(capsys.readouterr().out)["projected"])
    assert projected[1] > projected[0]


@pytest.mark.parametrize("schedule", ["tile", "slide"])
def test_overrides(capsys, schedule):
    assert call("plan", SMOOTH, SHAPE, "--regions", "16x16", "--schedule", schedule) == 0
    assert schedule in capsys.readouterr().out


def test_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert call("plan", SMOOTH, SHAPE, "--plot", tmp_path / "plan.png", *SMALL) == 0
    assert read_image(tmp_path / "plan.png").ndim == 3


@pytest.mark.parametrize("name", ["Namespace.smooth", "smooth_already_made"])
def test_forms_of_a_factory(capsys, name):
    assert call("plan", f"tests.cli.models:{name}", SHAPE) == 0


def test_a_factory_in_the_working_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "model_of_the_user.py").write_text("import torch\ndef make(): return torch.nn.Conv2d(3, 4, 3)\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert call("plan", "model_of_the_user:make", SHAPE) == 0
    assert sys.path == path


def test_an_archive(tmp_path, capsys):
    path = tmp_path / "smooth.pt2"
    torch.export.save(torch.export.export(Smooth().eval(), (torch.rand(1, 3, 40, 56),)), path)
    assert call("plan", path, SHAPE) == 0
    assert call("run", path, SHAPE, "-o", tmp_path / "out.npy") == 0
    assert np.load(tmp_path / "out.npy").shape == (1, 3, 40, 56)


# ---------------------------------------------------------------------------------------- run


@pytest.mark.parametrize("ending", [".png", ".tif", ".npy"])
def test_run_gives_the_numbers_of_the_untouched_model(tmp_path, picture, capsys, ending):
    out = tmp_path / f"out{ending}"
    assert call("run", SMOOTH, picture, "-o", out, "--regions", "16x16", "--json") == 0
    torch.manual_seed(0)
    x = torch.from_numpy(read_image(picture).astype(np.float32))[None] / 255
    with torch.no_grad():
        expected = Smooth()(x)[0].numpy()
    given = np.load(out) if ending == ".npy" else read_image(out)
    if ending == ".png":
        assert np.abs(given.astype(float) - expected * 255).max() <= 0.51
    else:
        np.testing.assert_allclose(given, expected, atol=1e-6)


def test_run_reports_allowed_projected_measured(tmp_path, capsys):
    assert call("run", SMOOTH, "1x3x256x256", "-o", tmp_path / "o.npy", "--memory", "2MB", "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["measured"] <= report["projected"] <= report["allowed"] == 2_000_000
    assert "region " in printed.err
    assert "took" in printed.err


def test_run_in_words(tmp_path, capsys):
    out = tmp_path / "o.npy"
    assert call("run", SMOOTH, SHAPE, "-o", out, "--quiet", "--no-measure", *SMALL) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"wrote      {out}" in printed.out
    assert "allowed    300 kB" in printed.out
    assert "measured   -" in printed.out


def test_several_inputs_and_outputs(tmp_path, capsys):
    model = "tests.cli.models:TwoOutputs"
    assert call("run", model, SHAPE, SHAPE, "-o", tmp_path / "o.tif", "--json") == 0
    assert [os.path.basename(f) for f in json.loads(capsys.readouterr().out)["files"]] == [
        "o-deep.tif",
        "o-plain.tif",
    ]
    assert read_image(tmp_path / "o-deep.tif").shape == (5, 40, 56)
    assert read_image(tmp_path / "o-plain.tif").shape == (3, 40, 56)


@pytest.mark.parametrize(("dtype", "stored"), [("float64", np.float64), ("bfloat16", np.float32)])
def test_dtypes(tmp_path, capsys, dtype, stored):
    assert call("run", SMOOTH, SHAPE, "-o", tmp_path / "o.npy", "--dtype", dtype) == 0
    assert np.load(tmp_path / "o.npy").dtype == stored


def test_an_output_that_png_cannot_hold_is_not_lost(tmp_path, capsys):
    assert call("run", "tests.cli.models:FiveChannels", SHAPE, "-o", tmp_path / "o.png") == 1
    assert "Nothing is lost" in error_of(capsys)
    assert os.listdir(tmp_path) == ["o.npy"]


def test_ctrl_c_leaves_no_file(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("ranger_nn.cli.run._also_flush", lambda step, flush: interrupted)
    assert call("run", SMOOTH, SHAPE, "-o", tmp_path / "o.npy", *SMALL) == 130
    assert error_of(capsys) == "ranger-nn: interrupted"
    assert os.listdir(tmp_path) == []
    with ranger_nn.measure("cpu"):  # the byte counter was stopped
        pass


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_no_file(tmp_path, number, status):
    out = tmp_path / "o.npy"
    options = [
        "--memory",
        "1GB",
        "--regions",
        "64x64",
        "--schedule",
        "tile",
        "--threads",
        "1",
        "--no-measure",
    ]
    command = [sys.executable, "-m", "ranger_nn.cli.main", "run", SMOOTH, "1x3x2048x2048", "-o", str(out)]
    # a job in the background, and all that it starts, ignores SIGINT: the command is to get it all the same
    heard = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, preexec_fn=heard) as process:
        assert "left" in process.stderr.readline()  # some regions are done, most are not
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == []


# -------------------------------------------------------------------------------------- bench


@pytest.mark.parametrize("options", [[], ["--train"]])
def test_bench(capsys, options):
    assert call("bench", SMOOTH, "1x3x128x128", "--memory", "2MB", "--repeat", "1", "--json", *options) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["regional_peak"] < result["untouched_peak"]
    assert result["regional_peak"] <= result["projected"] <= result["allowed"]
    assert result["largest_difference"] <= 1e-4


def test_bench_in_words(capsys):
    assert call("bench", SMOOTH, SHAPE, "--repeat", "1", *SMALL) == 0
    printed = capsys.readouterr().out
    for word in ("untouched", "regional", "ratio", "difference", "allowed", "projected", "measured"):
        assert word in printed


# ---------------------------------------------------------------- failures: status 1, one line


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("missing.pt2", "no such file"),
        ("just_a_name", "package.module:factory"),
        (":factory", "package.module:factory"),
        ("no_such_module:factory", "cannot import"),
        ("tests.cli.models:missing", "has no 'missing'"),
        ("tests.cli.models:not_callable", "not callable"),
        ("tests.cli.models:gives_a_number", "int, not a torch.nn.Module"),
        ("tests.cli.models:fails", "RuntimeError: weights are missing (give --debug"),
        ("tests.cli.models:scripted", "TorchScript module"),
        ("tests.cli.models:data_parallel", "Give its .module"),
        ("tests.cli.models:distributed", "Give its .module"),
        ("tests.cli.models:regionalized", "regionalized already"),
        ("tests.cli.models:leaves", "left the program"),
        ("tests.cli.models:needs_an_argument", "called without arguments, but takes (width"),
        ("tests.cli.models:clears_the_screen", "a\\x1b[2Jb"),
        (".relative:f", "cannot import"),
        ("tests/cli/models.py", "It is a file"),
        ("tests", "It is a folder"),
        ("", "package.module:factory"),
    ],
)
def test_a_model_that_cannot_be_had(capsys, model, reason):
    assert call("plan", model, SHAPE) == 1
    line = error_of(capsys)
    assert line.startswith("ranger-nn: error: ")
    assert reason in line


def test_an_archive_that_is_none(tmp_path, capsys):
    (tmp_path / "a.pt2").write_bytes(b"not an archive")
    assert call("plan", tmp_path / "a.pt2", SHAPE) == 1
    assert "not an archive" in capsys.readouterr().err


def test_debug_shows_where(capsys):
    assert call("plan", "tests.cli.models:fails", SHAPE, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_budget_too_small_names_the_least_that_fits(capsys):
    assert call("plan", SMOOTH, "1x3x512x512", "--memory", "1kB") == 1
    assert capsys.readouterr().err.startswith("ranger-nn: error: ")


@pytest.mark.parametrize("name", ["folder.pt2", "no_right.pt2"])
def test_an_archive_that_cannot_be_read(tmp_path, capsys, monkeypatch, name):
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "no_right.pt2").write_bytes(b"")
    monkeypatch.setattr(os, "access", lambda *arguments: False)  # whoever runs the tests
    assert call("plan", tmp_path / name, SHAPE) == 1
    assert ("is a folder" if name == "folder.pt2" else "may not be read") in error_of(capsys)


@pytest.mark.parametrize("command", ["plan", "bench"])
@pytest.mark.parametrize(
    ("model", "inputs", "reason"),
    [
        (SMOOTH, [SHAPE, SHAPE], "does not take 2 INPUT(s) in order: its forward(x"),
        ("tests.cli.models:TwoOutputs", [SHAPE], "missing a required argument: 'y'"),
    ],
)
def test_a_wrong_number_of_inputs(capsys, command, model, inputs, reason):
    assert call(command, model, *inputs) == 1
    assert reason in error_of(capsys)


def test_a_shape_that_no_machine_holds(tmp_path, capsys):
    assert call("plan", SMOOTH, "1x3x9999999999x9999999999") == 1
    assert "larger than this machine can hold" in error_of(capsys)
    assert call("run", SMOOTH, "1x3x99999999x99999999", "-o", tmp_path / "o.npy") == 1
    assert "larger than this machine can hold" in error_of(capsys)


@pytest.mark.parametrize(
    ("path", "reason"),
    [("plan", "must name a file"), ("plan.exe", "cannot be drawn"), ("missing/plan.png", "No such file or directory")],
)
def test_a_plot_that_cannot_be_written(tmp_path, capsys, path, reason):
    pytest.importorskip("matplotlib")
    assert call("plan", SMOOTH, SHAPE, "--plot", tmp_path / path) == 1
    assert reason in error_of(capsys)


def test_a_name_that_is_too_long(capsys):
    assert call("plan", SMOOTH, "a" * 5000 + ".tif") == 1
    assert len(error_of(capsys)) < 500


@pytest.mark.parametrize("given", ["missing.png", "not-a-shape"])
def test_an_input_that_cannot_be_had(capsys, given):
    assert call("plan", SMOOTH, given) == 1
    assert given in error_of(capsys)


def test_the_output_is_checked_before_the_work(tmp_path, capsys):
    assert call("run", SMOOTH, SHAPE, "-o", tmp_path / "missing" / "o.npy") == 1
    assert "no folder" in error_of(capsys)
    assert call("run", SMOOTH, SHAPE, "-o", tmp_path / "o.gif") == 1
    assert "must end in one of" in error_of(capsys)


def test_a_device_that_is_not_there(capsys):
    assert call("plan", SMOOTH, SHAPE, "--device", "quantum") == 1
    assert "not a device" in error_of(capsys)


# ------------------------------------------------------------------------------ usage: status 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["plan"],
        ["plan", SMOOTH],
        ["run", SMOOTH, SHAPE],
        ["plan", SMOOTH, SHAPE, "--memory", "12 parsecs"],
        ["plan", SMOOTH, SHAPE, "--memory", "0"],
        ["plan", SMOOTH, SHAPE, "--regions", "0x4"],
        ["plan", SMOOTH, SHAPE, "--regions", "axb"],
        ["plan", SMOOTH, SHAPE, "--schedule", "fold"],
        ["plan", SMOOTH, SHAPE, "--regions", "9" * 5000],
        ["plan", SMOOTH, SHAPE, "--regions", "nan"],
        ["plan", SMOOTH, SHAPE, "--memory", "nan"],
        ["plan", SMOOTH, SHAPE, "--memory=-5"],
        ["plan", SMOOTH, SHAPE, "--threads", "0"],
        ["plan", SMOOTH, SHAPE, "--threads", "1000000"],
        ["plan", SMOOTH, SHAPE, "--threads", "9" * 5000],
        ["plan", SMOOTH, SHAPE, "--seed", "9" * 30],
        ["plan", SMOOTH, SHAPE, "--seed", "9" * 5000],
        ["plan", SMOOTH, SHAPE, "--seed", "x"],
        ["plan", SMOOTH, SHAPE, "--dtype", "int8"],
        ["run", SMOOTH, SHAPE, "-o", "o.npy", "--train"],
    ],
)
def test_wrong_usage(capsys, arguments):
    assert call(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("usage: ranger-nn")


def test_a_wrong_amount_is_explained(capsys):
    assert call("plan", SMOOTH, SHAPE, "--memory", "5XB") == 2
    assert "'XB' is not known" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version(capsys, option):
    assert call(option) == 0
    assert "ranger-nn" in capsys.readouterr().out


def test_help_imports_no_framework():
    program = (
        "import sys\nfrom ranger_nn.cli.main import main\nstatus = main(['plan', '--help'])\n"
        "assert status == 0\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
