"""Optional output: a run finishes without figures, model card, page and generation config, and `report` adds them."""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
import subprocess
import sys

import matplotlib
import pytest
from transformers import AutoModelForCausalLM

from gprune.__main__ import run as command
from gprune.errors import UserError, optional_output
from gprune.export.hf import save_pruned
from gprune.models.loading import load_model
from gprune.report.figures import loss_figure, save
from gprune.runs.numbers import run_frame
from gprune.runs.results import load_run
from tests import synthetic_run, tiny_run

INVALID = {"sequences": {"num_return_sequences": 4}, "words": {"max_new_tokens": "many"}, "not an object": [1]}


@pytest.mark.parametrize("content", INVALID.values(), ids=INVALID)
def test_an_invalid_generation_config_is_ignored_with_one_warning(tmp_path, caplog, content):
    folder = tiny_run.save_tiny_model(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING, "gprune"):
        model, tokenizer = load_model(str(folder))
    assert ["generation_config.json is ignored" in line for line in caplog.messages] == [True]
    exported = AutoModelForCausalLM.from_pretrained(save_pruned(model, tokenizer, tmp_path / "export"))
    assert exported.generation_config.eos_token_id == model.config.eos_token_id


def test_a_valid_generation_config_is_exported(tmp_path):
    folder = tiny_run.save_tiny_model(tmp_path / "model")
    settings = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3]}  # without do_sample, like that of Llama 2
    (folder / "generation_config.json").write_text(json.dumps(settings))
    export = save_pruned(*load_model(str(folder)), tmp_path / "export")
    assert settings.items() <= json.loads((export / "generation_config.json").read_text()).items()


@pytest.mark.slow
def test_a_run_finishes_without_figures_model_card_and_page_and_report_adds_them(tmp_path, monkeypatch, capsys):
    with tiny_run.isolated(tmp_path / "cache"):
        tiny_run.draw(monkeypatch)
        world = tiny_run.make_world(tmp_path)
        args = world.args(tmp_path, "--gprune=false")
        first = world.run(tmp_path, "--gprune=false")
        card = (first.path / "model/README.md").read_text()
        (first.path / "metrics.json").unlink()
        page, figures = first.path / "report.html", first.path / "figures"
        page.unlink()
        page.mkdir()  # os.replace cannot replace a folder by a file
        shutil.rmtree(figures)
        figures.touch()
        with monkeypatch.context() as patch:
            patch.setattr("gprune.report.card.ModelCardData", lambda **_: 1 / 0)
            shutil.rmtree(first.path / "model")  # the export is written again, with its model card
            capsys.readouterr()
            assert tiny_run.main(args) == 0
        not_written = re.findall(r"Could not write (.+?): .+\. The run continues; .+\.", capsys.readouterr().out)
        assert not_written == ["the model card", "figures", "report.html"]
        loaded = load_run(first.path)
        assert (loaded.records, loaded.masks) == (first.records, first.masks)
        page.rmdir()
        figures.unlink()
        assert command("report", [str(first.path)]) == 0
        assert (first.path / "figures/loss.png").is_file()
        assert (first.path / "model/README.md").read_text() == card
        assert "<img" in (first.path / "report.html").read_text()


def test_optional_output_raises_for_a_full_disk_or_ctrl_c_and_logs_other_errors(caplog):
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = UserError("Cannot write")
    wrapped.__cause__ = full
    for error in (full, wrapped, KeyboardInterrupt()):
        with pytest.raises(type(error)), optional_output("figures", "they come back"):
            raise error
    with optional_output("figures", "they come back"):
        raise ValueError("one\ntwo")
    assert caplog.messages == ["Could not write figures: one. The run continues; they come back."]


def test_figures_do_not_depend_on_matplotlib_settings_of_the_user(tmp_path):
    (plain,) = save(loss_figure(run_frame("", synthetic_run.records())), tmp_path, "plain")
    user_settings = {
        "text.usetex": True, "font.family": "no such font", "figure.dpi": 30, "savefig.bbox": "tight",
        "axes.facecolor": "red",
    }  # fmt: skip
    with matplotlib.rc_context(user_settings):
        before = dict(matplotlib.rcParams)
        (with_settings,) = save(loss_figure(run_frame("", synthetic_run.records())), tmp_path, "with-settings")
        assert dict(matplotlib.rcParams) == before
    assert with_settings.read_bytes() == plain.read_bytes()


def test_invalid_matplotlib_settings_do_not_prevent_the_import_of_matplotlib(tmp_path):
    """A fresh process imports matplotlib as every run does first, and keeps the user's variables."""
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe\x80")
    code = "from gprune.console import import_matplotlib as run; run(); import os; print(os.environ['MPLBACKEND'])"
    variables = tiny_run.environment(tmp_path, MPLBACKEND="nonsense", MATPLOTLIBRC=str(tmp_path / "matplotlibrc"))
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "nonsense\n"), done.stderr
