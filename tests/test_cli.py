"""`interfuse doctor`, `interfuse demo` and `interfuse explain` (the bench command has a file of its own)."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from interfuse import cli, doctor

if TYPE_CHECKING:
    import pathlib


def test_doctor_prints_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    assert "instruction set" in text
    assert "back ends of conv_pool:" in text
    assert "back ends of losses:" in text
    assert "back ends of rnn:" in text
    assert "native on cpu: ready" in text
    assert "Everything is in order." in text


def test_doctor_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["native"]["isa"] in found["native"]["isas"]
    assert found["threads"]["torch"] == torch.get_num_threads()
    for rows in found["backends"].values():
        assert all(row["reason"] is None or row["reason"].endswith(".") for row in rows)


def test_doctor_names_what_is_wrong() -> None:
    found = doctor.examine()
    found["native"] = {"reason": "The compiled core cannot be imported: no such file"}
    found["threads"]["openmp_runtimes"] = ["libgomp.so.1", "libiomp5.so"]
    assert len(doctor.problems(found)) == 2
    assert doctor.text(found).count("PROBLEM: ") == 2


def test_demo_writes_a_table_and_json(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["demo", "--quick", "--size", "32", "--batch", "1", "--seconds", "0.01"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "demo.json").read_text())
    assert [row["part"] for row in result["rows"]] == [
        "block 3 -> 32", "block 32 -> 64", "block 64 -> 128", "the whole stack",
        "a training step of the stack",
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["part"] in printed
        assert row["ratio"] == pytest.approx(row["times"]["torch"] / row["times"]["interfuse"])
        assert max(row.get("errors", {"none": 0.0}).values()) < 1e-4
    assert len(result["models"]) == 4
    for row in result["models"]:
        assert row["model"] in printed
        assert row["ratio"] == pytest.approx(row["times"]["torch"] / row["times"]["interfuse"])
        assert max(row.get("errors", {"none": 0.0}).values()) < 1e-4
    assert [row["seen"] for row in result["learning"]] == ["image alone", "text alone", "image + text"]
    for row in result["learning"]:
        assert f"{row['accuracy']:.1%}" in printed


def test_demo_says_how_small_an_image_may_be(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smallest = ["--quick", "--size", "22", "--batch", "1", "--seconds", "0.001", "--out", str(tmp_path)]
    assert cli.main(["demo", *smallest]) == 0
    assert cli.main(["demo", "--size", "21"]) == 2
    assert "at least 22 pixels" in capsys.readouterr().err


SCRIPT = """
import torch
from torch import nn

size = 3


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(10, 4), nn.LSTM(4, 8)

    def forward(self, ids):
        return self.rnn(self.embed(ids))[0]


made = Net()


def a_number():
    return size
"""


@pytest.fixture
def script(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which the script's folder is added
    path = tmp_path / "some_model.py"
    path.write_text(SCRIPT)
    return str(path)


@pytest.mark.parametrize("name", ["Net", "made"])
def test_explain_a_script(script: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", f"{script}:{name}"]) == 0
    text = capsys.readouterr().out
    assert "Net: 1 of 1 sites fused" in text
    assert "Conv2d -> ReLU -> MaxPool2d" in text


def test_explain_a_module_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "models_zoo:VGG", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fused"] == sum(row["fused"] for row in found["rows"]) > 0
    assert all(row["verdict"] for row in found["rows"])


def test_explain_with_inputs_measures(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", f"{script}:Tagger", "--input", "5x2:int64", "--json"]) == 0
    (row,) = [r for r in json.loads(capsys.readouterr().out)["rows"] if r["calls"] == "LSTM"]
    assert len(row["inference"]) == 2  # the model's own time, and the fused one's


@pytest.mark.parametrize(
    ("target", "more", "sentence"),
    [
        ("{script}", [], "Name a model of"),
        ("{script}:Nett", [], "It has: Net, Tagger, made, a_number."),
        ("{script}:a_number", [], "gives int; it must be a torch.nn.Module"),
        ("nowhere.py:Net", [], "There is no file nowhere.py."),
        ("no_such_package.models:Net", [], "There is no module 'no_such_package.models'"),
        ("{script}:Net", ["--input", "1,3,8,8"], "1x3x64x64, or 1x20:int64; got '1,3,8,8'."),
        ("{script}:Net", ["--input", "1x3:int3"], "a type of float32, bfloat16, int64"),
    ],
)
def test_explain_says_what_is_missing(
    script: str, target: str, more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", target.format(script=script), *more]) == 2
    assert sentence in capsys.readouterr().err
