"""The command line: start-up, exit status, one-line errors."""

import resource
import subprocess
import sys

import pytest

from acmil.cli import run_command_line
from acmil.config import CrossvalConfig, DemoConfig, EvaluateConfig, HeatmapConfig, TrainConfig, UmapConfig
from acmil.preprocessing.config import PreprocessConfig

HELP = """
import sys
from acmil.cli import run_command_line
status = run_command_line({arguments})
print("torch" in sys.modules, status)
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_help_does_not_import_torch():
    code = HELP.format(arguments=["--help"])
    result = run_python(code)
    assert result.stdout.splitlines()[-1] == "False 0", result.stderr
    assert "preprocess" in result.stdout


@pytest.mark.parametrize(
    "command", ["demo", "preprocess", "train", "crossval", "evaluate", "heatmap", "umap", "samples", "doctor"]
)
def test_help_of_each_command_does_not_import_torch(command):
    code = HELP.format(arguments=[command, "--help"])
    result = run_python(code)
    assert result.stdout.splitlines()[-1] == "False 0", result.stderr


def test_help_starts_in_half_a_second():
    """Seconds of processor time, the least of five: other work on the machine stretches the clock, not this."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "acmil", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5, seconds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "trian"),
        (["train", "--epoch", "3"], "epoch"),
        (
            ["train", "c.csv", "--features", "f", "--out", "o", "--epochs", "0"],
            "epochs should be greater than or equal to 1, got 0",
        ),
        (["train", "c.csv", "--out", "o"], "features is missing. Give --features"),
        (["train", "c.csv", "--features", "f", "--out", "o", "--config", "nothing.yaml"], "no configuration file"),
        (["train", "c.csv", "--features", "f", "--out", "o", "--warmup-epochs", "100"], "epochs 100, got 100.\n"),
        (["features", "verify", "a", "b"], "nothing takes 'b'. A name with spaces needs quotes"),
    ],
)
def test_wrong_command_lines_exit_2_with_the_mend(capsys, arguments, message):
    assert run_command_line(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) <= 2


def test_eval_is_evaluate(capsys):
    assert run_command_line(["eval", "--help"]) == 0
    assert "held-out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate"), "not enough memory: CUDA out of memory."),
        (KeyError("test"), "unexpected KeyError: 'test'. Give --debug to see where."),
    ],
)
def test_an_error_that_nobody_foresaw_is_one_line(monkeypatch, capsys, error, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("acmil.evaluation.evaluate", fail)
    arguments = ["evaluate", "r", "c", "--features", "f", "--out", "o"]
    assert run_command_line(arguments) == 1
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown
    assert run_command_line([*arguments, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_failing_input_exits_1_and_debug_shows_the_traceback(capsys, tmp_path):
    arguments = ["train", str(tmp_path / "none.csv"), "--features", str(tmp_path), "--out", str(tmp_path / "run")]
    assert run_command_line(arguments) == 1
    error = capsys.readouterr().err
    assert "none.csv" in error
    assert "Traceback" not in error
    assert run_command_line([*arguments, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "target", "config"),
    [
        ("demo", "acmil.demo.pipeline.demo", DemoConfig(device="cpu")),
        ("preprocess", "acmil.preprocessing.job.preprocess", PreprocessConfig(slides=["s"], out="o", encoder="e")),
        (
            "preprocess",
            "acmil.preprocessing.job.preprocess",
            PreprocessConfig(
                **{"slides": ["s"], "out": "o", "encoder": "e", "min_focus": 0.3, "max_pen": 0.1, "max_fold": 0.0},
                **{"max_blood": 0.2, "max_dark": 0.4, "min_stain": 0.15},
            ),
        ),
        ("train", "acmil.training_run.train", TrainConfig(cohort="c", features="f", out="o")),
        ("crossval", "acmil.crossval.crossval", CrossvalConfig(cohort="c", features="f", out="o", n_seeds=3)),
        ("evaluate", "acmil.evaluation.evaluate", EvaluateConfig(run="r", cohort="c", features="f", out="o")),
        ("heatmap", "acmil.heatmaps.heatmaps", HeatmapConfig(run="r", slides=["s"], features="f", out="o")),
        ("umap", "acmil.projection.umap", UmapConfig(run="r", cohort="c", features="f", out="o")),
    ],
)
def test_every_option_reaches_its_command(monkeypatch, command, target, config):
    """Each option given once as a flag gives the config back: none is lost, renamed or taken for something else."""
    arguments = [command, "--quiet"]
    for name, value in config.model_dump(mode="json").items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments += [flag] if value else ["--no-" + flag[2:]]
        elif value is not None:
            arguments += [flag, *map(str, value if isinstance(value, list) else [value])]
    received = []
    monkeypatch.setattr(target, lambda config, *, progress: received.append(config))
    assert run_command_line(arguments) == 0
    assert received == [config]


def test_config_file_is_read_and_flags_win(capsys, tmp_path):
    options = tmp_path / "options.yaml"
    options.write_text(f"cohort: {tmp_path / 'from_file.csv'}\nfeatures: {tmp_path}\nout: {tmp_path / 'run'}\n")
    assert run_command_line(["train", "--config", str(options)]) == 1
    assert "from_file.csv" in capsys.readouterr().err
    assert run_command_line(["train", str(tmp_path / "flag.csv"), "--config", str(options)]) == 1
    assert "flag.csv" in capsys.readouterr().err


def test_a_flag_that_negates_has_no_negative(capsys):
    assert run_command_line(["features", "convert", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--without-geometry" in shown
    assert "--no-" not in shown
