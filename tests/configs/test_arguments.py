"""The command line of `server launch`, and the table it is made from."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import msgspec
import pytest

from srt.configs.arguments import launch_parser, parse_launch
from srt.configs.foreign import FOREIGN
from srt.configs.server import ServerConfig, fields
from srt.errors import StartupError
from tools.options_page import page

HERE = Path(__file__).parents[2]
MODEL = ["--model-path", "checkpoint"]
OTHER = {"str": "other", "int": "2", "float": "0.5"}


def test_there_are_at_most_64_fields_and_each_is_described() -> None:
    table = fields()
    assert [field.name for field in table] == [info.name for info in msgspec.structs.fields(ServerConfig)]
    assert len(table) <= 64
    for field in table:
        assert field.option.help.endswith("."), field.name
        assert field.default_text, field.name
        assert field.option.unit or field.kind is not int or field.option.maximum or field.name == "random_seed"


def test_no_name_is_declared_twice() -> None:
    names = [name for action in launch_parser()._actions for name in action.option_strings]
    assert len(names) == len(set(names))


def test_nothing_but_a_model_gives_the_defaults() -> None:
    assert parse_launch(MODEL).server == ServerConfig(model_path="checkpoint")


def test_nothing_at_all_gives_the_built_in_model() -> None:
    assert parse_launch([]).server == ServerConfig() == ServerConfig(model_path="builtin:tiny")


@pytest.mark.parametrize("field", fields(), ids=lambda field: str(field.name))
def test_every_option_arrives_under_every_name(field: object) -> None:
    row = next(row for row in fields() if row == field)
    option = row.option
    if row.kind is bool:
        words: list[str] = []
        wanted: object = True
    else:
        text = option.choices[-1] if option.choices else OTHER[row.kind.__name__]
        if option.minimum is not None and float(text) < option.minimum:
            text = f"{option.minimum:g}"
        words, wanted = [text], row.kind(text)
    for name in (row.flag, *option.aliases, *option.peer_names):
        parsed = parse_launch([*MODEL, name, *words])
        assert msgspec.structs.asdict(parsed.server)[row.name] == wanted
        assert parsed.notices == ((f"{name} is taken as {row.flag}",) if name in option.peer_names else ())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--port", "70000"], "--port is 70000; the largest value is 65535"),
        (["--port", "http"], "--port is 'http'; it must be an integer"),
        (["--page-size", "0"], "--page-size is 0; the smallest value is 1 tokens"),
        (["--page-size", "65"], "--page-size is 65; the largest value is 64 tokens"),
        (["--swa-full-tokens-ratio", "nan"], "--swa-full-tokens-ratio is nan"),
        (["--drain-timeout", "soon"], "--drain-timeout is 'soon'; it must be a number"),
        (["--dtype", "fp4"], "--dtype is 'fp4'; it must be one of auto, bfloat16, float32"),
        (["-q", "int4"], "--quantization is 'int4'; it must be one of auto, fp8"),
        (["--prot", "80"], "unknown option --prot; did you mean --port"),
        (["--zzzzzz"], "unknown option --zzzzzz; `server launch --help`"),
        (["--max-run", "3"], "unknown option --max-run"),
        (["extra"], "unexpected argument 'extra'"),
        (["--port"], "--port: expected one argument"),
        (["--model-path", ""], "--model-path is empty"),
        (["--mem-fraction-static", "1.8"], "--mem-fraction-static is 1.8; the largest value is 1"),
        (["--kv-cache-memory-bytes", "9"], "--kv-cache-memory-bytes 9 is refused: give the size of the KV pool"),
        (["--speculative-algorithm", "medusa"], "--speculative-algorithm is 'medusa'; it must be one of"),
        (["--speculative-eagle-topk", "4"], "--speculative-eagle-topk 4 is refused: guesses form a chain"),
        (["--kv-cache-dtype", "int8"], "--kv-cache-dtype is 'int8'"),
        (["--cuda-graph-bs", "1", "2", "4"], "--cuda-graph-bs 1 2 4 is refused"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(StartupError) as caught:
        parse_launch(arguments if not arguments else [*MODEL, *arguments])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for foreign in FOREIGN for name in foreign.names])
def test_every_flag_of_another_server_gets_its_own_sentence(name: str) -> None:
    foreign = next(foreign for foreign in FOREIGN if name in foreign.names)
    if foreign.refused:
        with pytest.raises(StartupError, match="is refused: "):
            parse_launch([*MODEL, name])
        for value in foreign.accepts:
            assert parse_launch([*MODEL, name, value]).notices == (
                f"{name} {value} changes nothing: {foreign.sentence}",
            )
    else:
        assert parse_launch([*MODEL, name]).notices == (f"{name} changes nothing: {foreign.sentence}",)


def test_a_published_launch_line_is_answered_flag_by_flag() -> None:
    words = ["--trust-remote-code", "--enable-metrics", "--max-model-len", "4096", "--sampling-backend", "auto"]
    parsed = parse_launch([*MODEL, "--tp", "8", *words])
    assert parsed.server.tp_size == 8
    assert parsed.server.context_length == 4096
    assert len(parsed.notices) == 4


def test_keys_are_no_part_of_the_configuration() -> None:
    parsed = parse_launch([*MODEL, "--api-key", "open", "--admin-api-key", "root"])
    assert (parsed.api_key, parsed.admin_api_key) == ("open", "root")
    assert "open" not in str(msgspec.structs.asdict(parsed.server).values())


def test_a_file_gives_options_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text("model-path: from-file\npage_size: 32\nport: 1\ndisable-radix-cache: true\nlog-requests: false\n")
    parsed = parse_launch(["--config", str(path), "--port", "2"])
    assert parsed.server == ServerConfig(model_path="from-file", page_size=32, port=2, disable_radix_cache=True)


def test_a_file_may_set_negative_numbers_and_keys(tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text("model: x\nchunked-prefill-size: -1\napi-key: open\ntrust-remote-code: true\n")
    parsed = parse_launch(["--config", str(path)])
    assert (parsed.server.chunked_prefill_size, parsed.api_key) == (-1, "open")
    assert parsed.notices[0].startswith("--trust-remote-code")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("prot: 80", "unknown key 'prot'; did you mean --port"),
        ("config: other.yaml", "unknown key 'config'"),
        ("port: true", "port is True; it must be a text or a number"),
        ("port: [1]", "port is [1]; it must be a text or a number"),
        ("log-requests: 1", "log-requests is 1; it must be true or false"),
        ("port: 70000", "--port is 70000; the largest value"),
        ("- port", "must hold a mapping"),
        ("{", "is not YAML"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(content: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(content)
    with pytest.raises(StartupError) as caught:
        parse_launch([*MODEL, "--config", str(path)])
    assert sentence in str(caught.value)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="No such file"):
        parse_launch(["--config", str(tmp_path / "none.yaml")])


def test_help_teaches_every_option_with_its_default_and_examples() -> None:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as left:
        parse_launch(["--help"])
    assert left.value.code == 0
    shown = " ".join(text.getvalue().split())
    for field in fields():
        assert field.flag in shown
        assert field.default_text.split()[0] in shown
    assert "examples:" in shown
    assert "--kv-cache-memory-bytes" not in shown


def test_the_page_of_options_is_not_stale() -> None:
    wanted = "\n".join(page()) + "\n"
    assert (HERE / "docs/options.md").read_text() == wanted, "run: python tools/options_page.py > docs/options.md"
