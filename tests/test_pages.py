"""Pages for users name keys, arguments and tests that exist."""

from __future__ import annotations

import ast
import io
import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from dist_lm.cli import app
from dist_lm.config import RunConfig
from dist_lm.config_files import load_config
from dist_lm.config_keys import ALIASES, ELSEWHERE, flatten
from tests.page_blocks import NEEDS, PAGES, REPOSITORY, SHELL, SOAK, Block, blocks, verb_of
from tests.recipe_text import write_recipe

pytestmark = pytest.mark.fast
_ROW = re.compile(r"^\| `(\w+)` \| (?:`([\w.]+)`|-) \|", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#]+)")


def test_every_argument_of_the_trainer_leads_to_the_key_that_the_loader_suggests(tmp_path: Path) -> None:
    rows = _ROW.findall((REPOSITORY / "docs" / "migrating.md").read_text())
    assert len(rows) > 15
    config: RunConfig = load_config(write_recipe(tmp_path)).config
    keys = set(flatten(config))
    for argument, key in rows:
        if key:
            assert key in keys
            assert ALIASES.get(argument, argument) == key
        else:
            assert argument in ELSEWHERE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_tests_and_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        functions = {
            node.name
            for node in ast.walk(ast.parse((REPOSITORY / file).read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        assert not name or name in functions, f"{file}::{name}"
    for link in _LINK.findall(text):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_the_pages_of_keys_and_verbs_are_current() -> None:
    pages = runpy.run_path(str(REPOSITORY / "docs" / "make_reference.py"))["PAGES"]
    for file, made in pages.items():
        assert (REPOSITORY / "docs" / file).read_text() == made(), "run `make reference`"


def test_the_page_of_keys_has_every_key(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "configuration.md").read_text()
    keys = {key.rpartition(".")[2] for key in flatten(load_config(write_recipe(tmp_path)).config)}
    assert {key for key in keys if f"| `{key}` |" not in text} <= {"schedule", "lora", "cache"}
    assert len(keys) > 60


def test_workflows_run_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    commands = {
        path.stem: [
            step["run"].split()
            for job in yaml.safe_load(path.read_text())["jobs"].values()
            for step in job["steps"]
            if "run" in step
        ]
        for path in (REPOSITORY / ".github" / "workflows").glob("*.yml")
    }
    made = {name: [words[1] for words in lines if words[0] == "make"] for name, lines in commands.items()}
    assert made == {"check": ["check", "test"], "docs": ["docs"], "release": ["check", "test", "wheel", "sbom"]}
    assert {target for names in made.values() for target in names} <= targets
    others = [" ".join(words[:3]) for lines in commands.values() for words in lines if words[0] != "make"]
    assert others == ["gh release create"], "what only the place of the release can do"


def test_every_page_stands_in_the_navigation_of_the_site() -> None:
    groups = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]
    entries = [value for group in groups for value in group.values()]
    named = [page for entry in entries for page in ([entry] if isinstance(entry, str) else map(_only_value, entry))]
    assert sorted(named) == [page.name for page in PAGES]


def _only_value(entry: dict[str, str]) -> str:
    (value,) = entry.values()
    return value


def test_the_make_targets_that_a_page_names_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    pages = [*PAGES, REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md"]
    named = {name for page in pages for name in re.findall(r"(?:^|`)make (\w+)", page.read_text(), re.MULTILINE)}
    assert {"audit", "browser", "sbom", "test"} <= named <= targets


def test_the_verbs_and_options_that_a_page_names_exist() -> None:
    top = typer.main.get_command(app)
    checked = 0
    for page in PAGES:
        for words in re.findall(r"`dist-lm ([^`\n]+)`", page.read_text()):
            command, rest = top, words.split()
            while rest and rest[0] in getattr(command, "commands", {}):
                command = command.commands[rest.pop(0)]  # type: ignore[attr-defined]
            options = {option for parameter in command.params for option in parameter.opts}
            assert command is not top or rest[0].startswith("--"), words
            named = [word.split("=")[0] for word in rest if word.startswith("-")]
            assert set(named) <= options | {"--help"}, f"{page.name}: {words}"
            checked += 1
    assert checked > 20


_PROGRAM = re.compile(
    r"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:watch .*)?"
    r"(?:\. |export |git |make |pip |python3? |docker |kubectl |sbatch |sky |ray |deepspeed |torchrun |dist-lm )"
)
_DIST_LM = re.compile(r"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:.* -- )?(?:python -m dist_lm|dist-lm) ([^#]+)")
# A command of a page ends where the shell begins.
_END = re.compile(r"\s[|>&]")
BLOCKS = list(blocks())
COMMANDS = [
    (block.page, shlex.split(_END.split(found[1].strip())[0]))
    for block in BLOCKS
    for line in block.commands
    if (found := _DIST_LM.match(line))
]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_of_commands_is_run_or_says_why_not(block: Block) -> None:
    assert block.language == SHELL or not any(map(_PROGRAM.match, block.commands)), "a block of commands is ```sh"
    if block.language != SHELL:
        return
    assert all(map(_PROGRAM.match, block.commands)), "a block of commands has nothing but commands"
    assert not block.mark or block.mark == SOAK or block.mark.startswith(NEEDS), block.mark


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else None)
def test_the_parser_takes_every_command_of_a_page(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("mlm\ndata\ntokenizer\nruns/x\n100\n"))
    verb, command, given = verb_of(words)
    assert verb, f"{page}: {words}"
    # Raises UsageError where it does not; starts nothing.
    command.make_context(" ".join(verb), given)


def test_a_test_runs_every_verb_that_a_page_shows() -> None:
    shown = {tuple(verb_of(words)[0]) for page, words in COMMANDS if page != "commands.md"}
    assert len(shown) > 20
    run = set[tuple[str, ...]]()
    for path in (REPOSITORY / "tests").rglob("*.py"):
        if path == Path(__file__) or path.name == "test_cli.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            given = node.args if isinstance(node, ast.Call) else getattr(node, "elts", [])
            words = [item.value for item in given if isinstance(item, ast.Constant) and isinstance(item.value, str)]
            # The verb stands at the beginning of what a test gives, or behind the program.
            begins = [0, *(place + 1 for place, word in enumerate(words) if word == "dist_lm")]
            run |= {tuple(words[begin : begin + size]) for begin in begins for size in (1, 2)}
    # The demo takes minutes: `make demo`; the log of a job is what `submit --follow` shows.
    assert shown - run <= {("demo",), ("job", "logs")}
