"""Every Python snippet of README.md and docs/ runs, and README's figures are those of the measured files."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest

from interfuse import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
# Whose tests also look at what their snippets leave behind.
TESTED_WITH_ITS_SUBJECT = {"models.md": "test_models_learn.py", "optimize.md": "test_optimize.py"}
WITH_SNIPPETS = [page for page in PAGES if PYTHON.search(page.read_text(encoding="utf-8"))]

# Measured on one machine; those that are there are checked.
RESULTS = ("conv_pool_cpu", "rnn_cpu", "linear_cpu", "attention_cpu", "losses_cpu", "models_cpu")
ROWS = {  # case: how README names it
    "first-224": "conv 3 -> 64, 224 x 224, batch 1",
    "second-111": "conv 32 -> 64, 111 x 111, batch 8",
    "third-54": "conv 64 -> 128, 54 x 54, batch 8",
    "conv3d-55": "conv3d 32 -> 64, 10 x 55 x 55, batch 2",
    "text-b1": "embedding 64, LSTM 128 twice, 64 steps, batch 1",
    "text-b32": "the same, batch 32",
    "audio-b16": "LSTM 40 -> 128 twice, 100 steps, batch 16",
    "wide-512": "LSTM 512 -> 512, 100 steps, batch 1",
    "ragged-b32": "LSTM 40 -> 128 twice, up to 100 steps, batch 32",
    "head-b1": "linear 512 + 128 -> 512 with ReLU -> 10, batch 1",
    "head-b32": "the same, batch 32",
    "head-b256": "the same, batch 256",
    "large-b1": "linear 25,088 -> 512, batch 1",
    "large-b32": "the same, batch 32",
    "q64-kv196-b8": "attention of 64 queries to 196 keys, width 256, batch 8",
    "q512-kv2048-b2": "attention of 512 queries to 2,048 keys, width 256, batch 2",
    "q512-kv2048-b2-ragged": "the same, contexts of 205 and 2,048 keys",
    "vocabulary-20k": "cross-entropy of linear 256 -> 20,000, 2,048 rows",
    "info-nce-2048x256": "InfoNCE of 2,048 rows of 256",
    "contrastive-4096x512": "contrastive loss of 4,096 pairs of 512",
    "bce-256x10000": "binary cross-entropy of 256 x 10,000 logits",
    "image-text-b1": "image (128 x 128) and text (64) fusion model, batch 1",
    "image-text-b8": "the same, batch 8",
    "image-text-b32": "the same, batch 32",
    "video-audio-b1": "video (22 x 112 x 112) and audio (100) fusion model, batch 1",
    "video-audio-b4": "the same, batch 4",
}


def snippets(page: Path) -> list[str]:
    return PYTHON.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "page", [p for p in WITH_SNIPPETS if p.name not in TESTED_WITH_ITS_SUBJECT], ids=lambda page: page.name
)
def test_the_snippets_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "snippets.py"  # a file, because optimize() reads the source of what it is given
    script.write_text("\n".join(snippets(page)), encoding="utf-8")
    runpy.run_path(str(script))


def test_the_other_pages_are_run_elsewhere() -> None:
    for page, test in TESTED_WITH_ITS_SUBJECT.items():
        assert Path(page).stem in (ROOT / "tests" / test).read_text(encoding="utf-8")
        assert snippets(ROOT / "docs" / page)


def commands(first: str) -> list[tuple[str, str]]:
    """What the pages say to type that starts with this word, in lines of their own or in the text: (page,
    command)."""
    found = []
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        prose = re.sub(r"```\w+\n.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        typed = re.findall(r"^    (.+?)(?: +#.*)?$", prose, re.MULTILINE)
        typed += [" ".join(quoted.split()) for quoted in re.findall(r"`([^`]+)`", prose)]
        found += [(page.name, line) for line in typed if line.split()[:1] == [first] and " " in line]
    assert found, first
    return found


def is_understood(line: str) -> bool:
    _, command, *arguments = shlex.split(line)
    if command == "explain" and not arguments:
        return True  # the command's name alone
    try:
        cli.parser().parse_args([command, *arguments])
    except SystemExit:
        return False
    return True


def test_the_commands_of_the_pages_exist() -> None:
    """What they do is tested in test_cli.py and test_bench.py."""
    for page, line in commands("interfuse"):
        assert is_understood(line), f"{page}: {line}"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for page, line in commands("make"):
        assert line.split()[1] in targets, f"{page}: {line}"
    for page, line in commands("python"):
        _, script, *more = line.split()
        exists = importlib.util.find_spec(more[0]) if script == "-m" else (ROOT / script).is_file()
        assert exists, f"{page}: {line}"
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for page, line in commands("pip"):
        for extra in re.findall(r"interfuse\[(\w+)\]", line):
            assert f"\n{extra} = [" in project, f"{page}: {line}"


def test_the_settings_of_the_build_are_those_of_cmake() -> None:
    text = (ROOT / "docs/embedding.md").read_text(encoding="utf-8")
    sources = [ROOT / "CMakeLists.txt", *sorted((ROOT / "cmake").glob("*.cmake"))]
    known = "".join(path.read_text(encoding="utf-8") for path in sources)
    options = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert options
    for option in options:
        assert re.search(rf"\b{option}\b", known), option
    (snippet,) = re.findall(r"```cmake\n(.*?)```", text, re.DOTALL)
    example = (ROOT / "examples/embed/CMakeLists.txt").read_text(encoding="utf-8")
    for line in snippet.splitlines():  # of the example, which test_packaging.py builds
        assert line.replace("(app ", "(embed ") in example


def milliseconds(seconds: float) -> str:
    digits = 3 if seconds < 1e-4 else 2 if seconds < 1e-2 else 1
    return f"{seconds * 1e3:.{digits}f}"


def figures(row: dict[str, Any]) -> str:
    """A line of README's table. Every provider counts at its better malloc, interfuse at the default one."""
    inference, training = row["inference"], row["training"]
    eager = min(heap["median"] for heap in inference["times"]["eager"].values())
    ours = inference["times"]["interfuse"]["default"]["median"]
    cells = [
        ROWS[row["case"]],
        milliseconds(ours),
        milliseconds(eager),
        f"{milliseconds(inference['best_peer']['median'])} ({inference['best_peer']['provider']})",
        f"{inference['best_peer']['median'] / ours:.2f}",
        f"{training['best_peer']['median'] / training['times']['interfuse']['default']['median']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def test_the_figures_of_the_readme_are_the_measured_ones() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = {}
    for name in RESULTS:
        path = f"bench/results/{name}.json"
        assert (path in readme) is (ROOT / path).exists()
        if path not in readme:
            continue
        result = json.loads((ROOT / path).read_text(encoding="utf-8"))
        assert result["machine"]["cores"] == result["settings"]["threads"] == 2
        for package, version in result["versions"].items():
            assert package == "interfuse" or version in readme
        lines |= {row["case"]: figures(row) for row in result["rows"] if row["case"] in ROWS}
    table = "\n".join(lines[case] for case in ROWS if case in lines)
    assert f"|---|---|---|---|---|---|\n{table}\n\n" in readme


def test_every_page_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [page.name for page in PAGES[1:] if f"docs/{page.name}" not in readme]
    assert not missing


def test_pages_name_files_that_exist() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(
            r"\b(?:docs|bench|tests|examples|csrc|kernels)/[\w/]+\.(?:md|py|json|h|c|cpp|cu)\b", text
        ):
            assert (ROOT / path).exists(), f"{page.name} names {path}, which does not exist"
