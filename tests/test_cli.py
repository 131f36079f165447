"""`interfuse doctor` and `interfuse demo` (the bench command has a file of its own)."""

from __future__ import annotations

import json
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
