"""The commands of the README and of docs/ run as they stand there, each page in a folder of its own.

Every block of commands without a mark runs in `make test`, those marked `make soak` in `make soak`
(tests/page_blocks.py); tests/test_pages.py parses all of them.  docs/commands.md, which is made from the help,
has three examples a verb: they differ by an option or a place, so the first one runs here, where no page has run the
verb.
The home page's commands, from texts to a report, come first; what they leave is what the other pages begin with.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.s3_server import BUCKET, s3_serving
from tests.gloo_ranks import REPOSITORY, environment
from tests.page_blocks import NEEDS, SHELL, SOAK, Block, blocks, verb_of

READY = Path(__file__).with_name("ready_program.py")
STARTS_S = 120.0
SMALL = {
    ". .venv/bin/activate\n": "",
    "--steps 200": "--steps 2",
    "--vocab-size 30522": "--vocab-size 2000",
    "@1000": "@2",
    "--gpus 1024": "--gpus 16",
    "--gpus 64": "--gpus 16",
    "s3://bucket": f"s3://{BUCKET}",
}
"""A small vocabulary, and few steps and ranks, do as well as many."""
ANSWERS = "mlm\ndata\ntokenizer\nruns/mine\n2\n"
"""What `dist-lm init` asks: task, data, tokenizer, run folder, steps."""
COMMANDS = [block for block in blocks() if block.language == SHELL and not block.mark.startswith(NEEDS)]
HOME = [block for block in COMMANDS if block.page == "index.md"]
REST = [block for block in COMMANDS if block.page != "index.md" and not block.mark]
LONG = [block for block in COMMANDS if block.mark == SOAK]
NER_AND_CHAT = """
dist-lm data prepare ner.jsonl --kind token_classification --tokenizer tokenizer --out ner --heldout 0.1
dist-lm init ner.yaml --task token_classification --data ner --tokenizer tokenizer --run-dir runs/ner --steps 2
dist-lm train -c ner.yaml --cpu 1 'run.best={metric: entity_f1}'
dist-lm tokenizer train corpus.jsonl --kind bpe --vocab-size 1000 --out gpt
dist-lm data prepare chat.jsonl --kind instruction --tokenizer gpt --out chat --heldout 0.1
dist-lm init base.yaml --task instruction --data chat --tokenizer gpt --run-dir runs/base --steps 1
dist-lm train -c base.yaml --cpu 1
dist-lm init chat.yaml --task instruction --data chat --tokenizer gpt --run-dir runs/chat --steps 1 --from runs/base
dist-lm train -c chat.yaml --cpu 1 'model.lora={rank: 2}'
"""


@pytest.fixture(scope="module")
def program() -> Iterator[str]:
    """The line of a shell that makes `dist-lm` the one of the repository, which has its imports behind it."""
    with tempfile.TemporaryDirectory(prefix="dist_lm-") as folder:
        socket = Path(folder) / "socket"
        server = subprocess.Popen([sys.executable, READY, "serve", socket], env=environment())
        try:
            deadline = time.monotonic() + STARTS_S
            while not socket.exists():
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield f'dist-lm() {{ {sys.executable} -I -S {READY} call {socket} "$@"; }}\n'
        finally:
            server.kill()
            server.wait()


def run(program: str, text: str, folder: Path) -> str:
    """What the commands print, in a folder that has nothing yet of what they make."""
    for there, here in SMALL.items():
        text = text.replace(there, here)
    for made in re.findall(r"(?:--out|dist-lm init) ([\w.-]+)", text):
        shutil.rmtree(folder / made, ignore_errors=True)
        (folder / made).unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", "-c", f"set -e\n{program}{text}"],
        cwd=folder,
        env=environment(),
        input=ANSWERS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_jsonl(path: Path, records: list[dict[str, object]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_sources(folder: Path) -> None:
    """Everything that a page takes as given."""
    for name in ("cluster", "docs", "ds_configs", "launch"):
        (folder / name).symlink_to(REPOSITORY / name)
    texts = [topics[name] for name in sorted(topics)]
    for file in ("texts/a.jsonl", "corpus.jsonl"):
        write_jsonl(folder / file, [{"text": text} for text in texts])
    (folder / "dump").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"article": texts}), folder / "dump" / "a.parquet")
    (folder / "refs").mkdir()
    parts = [" ".join(part.split()) for text in texts for part in text.split("\n\n")]
    abstracts = "".join(f"TY  - JOUR\nAB  - {part}\nER  -\n" for part in parts if part)
    (folder / "refs" / "a.ris").write_text(abstracts)
    for file in ("train.en", "train.de"):
        (folder / file).write_text("A line.\nAnother line.\n")
    (folder / "test.conll").write_text("EU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\nBonn NNP B-NP B-LOC\n")
    rows = [(text[:400], "short" if len(name) < 7 else "long") for name, text in sorted(topics.items())]
    for file, part in (("reviews.csv", rows[:60]), ("new.csv", rows[60:])):
        with (folder / file).open("w", newline="") as opened:
            csv.writer(opened).writerows([("review", "kind"), *part])


@pytest.fixture(scope="module")
def home(program: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder after the commands of the home page."""
    folder = tmp_path_factory.mktemp("home")
    write_sources(folder)
    for block in HOME:
        run(program, block.text, folder)
    for name in ("demo", "x"):
        shutil.copytree(folder / "runs" / "mine", folder / "runs" / name)
    return folder


@pytest.fixture(scope="module")
def object_storage() -> Iterator[None]:
    with s3_serving():
        yield


@pytest.fixture
def place(home: Path, object_storage: None, tmp_path: Path) -> Path:
    return shutil.copytree(home, tmp_path / "place", symlinks=True)


def test_the_home_page_leads_to_a_report(home: Path) -> None:
    assert "</html>" in (home / "report.html").read_text()


@pytest.mark.parametrize("block", [block for block in REST if block.page != "commands.md"], ids=str)
def test_the_commands_of_a_page_run(program: str, block: Block, place: Path) -> None:
    run(program, block.text, place)


def test_the_first_example_of_each_verb_runs(program: str, place: Path) -> None:
    pages = [block for block in (*HOME, *REST) if block.page != "commands.md"]
    ran = {_verb(line) for block in pages for line in block.commands}
    examples = [block.commands[0] for block in REST if block.page == "commands.md"]
    examples = [example for example in examples if _verb(example) not in ran]
    assert len(examples) > 10
    for example in examples:
        run(program, example, place)


def _verb(line: str) -> str:
    return " ".join(verb_of(shlex.split(line.partition("dist-lm ")[2], comments=True))[0])


@pytest.mark.soak
@pytest.mark.parametrize("block", [block for block in LONG if block.page in ("doctor.md", "plan.md")], ids=str)
def test_the_long_commands_of_a_page_run(program: str, block: Block, place: Path) -> None:
    run(program, block.text, place)


@pytest.mark.soak
def test_from_a_csv_of_ones_own_to_a_model(program: str, place: Path) -> None:
    run(program, LONG[0].text, place)
    records = list(csv.reader((place / "new.csv").open(newline="")))[1:]
    assert len((place / "predicted.jsonl").read_text().splitlines()) == len(records)
    assert json.loads((place / "model" / "config.json").read_text())["id2label"] == {"0": "long", "1": "short"}
    assert "confusion" in (place / "report.html").read_text().lower()


@pytest.mark.soak
def test_from_texts_of_ones_own_to_a_model(program: str, place: Path) -> None:
    shutil.rmtree(place / "runs")
    write_jsonl(place / "new.jsonl", [{"text": "The [MASK] statement raises an exception."}])
    write_jsonl(place / "test.jsonl", [{"text": text[:300]} for text in list(topics.values())[:3]])
    assert "pseudo_perplexity" in run(program, LONG[1].text, place)
    assert "prediction" in json.loads((place / "predicted.jsonl").read_text())


@pytest.mark.soak
def test_the_commands_on_fine_tuned_models_run(program: str, place: Path) -> None:
    sentences = [{"tokens": ["Anna", "sees", name], "tags": ["B-PER", "O", "B-LOC"]} for name in sorted(topics)]
    write_jsonl(place / "ner.jsonl", sentences)
    write_jsonl(place / "chat.jsonl", [{"prompt": name, "response": text[:200]} for name, text in topics.items()])
    run(program, NER_AND_CHAT, place)
    write_jsonl(place / "texts.jsonl", [{"tokens": record["tokens"]} for record in sentences[:4]])
    write_jsonl(place / "test.jsonl", [{**record, "language": "en"} for record in sentences[:4]])
    for block in LONG:
        if block.page == "tasks.md":
            run(program, block.text, place)
    assert "prediction" in json.loads((place / "entities.jsonl").read_text().splitlines()[0])
    assert "en" in (place / "figures.json").read_text()
    assert (place / "adapter" / "adapter_config.json").is_file()
