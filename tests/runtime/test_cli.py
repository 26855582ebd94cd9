"""belle-run over a fake engine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import belle_compile
from belle_compile.runtime import Engine, EngineError
from belle_compile.runtime.artifact import PromptTemplate
from belle_compile.runtime.cli import main
from tests.runtime.fakes import FakeExecutor, make_directory, make_engine, script_rule

ANSWER = "你好,世界"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Engine.load gives an engine that answers every prompt with ANSWER; the arguments of each load."""
    calls: list[dict[str, Any]] = []

    def load(directory: Path, **options: Any) -> Engine:
        calls.append({"directory": directory, **options})
        engine = make_engine()
        answer = engine.tokenizer.encode(ANSWER)

        def rule(context: list[int]) -> Any:
            said = next((n for n in range(len(answer), 0, -1) if context[-n:] == answer[:n]), 0)
            return script_rule(len(context) - said, answer)(context)

        return make_engine(FakeExecutor(rule, max_blocks=16))

    monkeypatch.setattr(Engine, "load", load)
    return calls


@pytest.fixture(scope="module", autouse=True)
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that is an engine by its manifest, which is looked at before the engine is loaded."""
    ENGINE.append(make_directory(tmp_path_factory.mktemp("engines") / "engine", {"tokenizer.json": b"{}"}))
    return ENGINE[-1]


ENGINE: list[Path] = []


def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(ENGINE[-1]), *arguments], input=stdin)


@pytest.mark.usefixtures("loads")
def test_answer_on_stdout_and_speed_on_stderr() -> None:
    result = run("hello")
    assert result.exit_code == 0 and result.stdout == ANSWER + "\n"
    assert "tokens/s, first after" in result.stderr and "drafts" not in result.stderr


def test_version() -> None:
    assert CliRunner().invoke(main, ["--version"]).stdout == f"belle-run, version {belle_compile.__version__}\n"


@pytest.mark.usefixtures("loads")
def test_answers_by_a_grammar(tmp_path: Path) -> None:
    schema, lark = tmp_path / "schema.json", tmp_path / "answer.lark"
    schema.write_text('{"enum": ["你好", 5]}', encoding="utf-8")
    lark.write_text('start: "你好" (",你好" | "!")', encoding="utf-8")
    for options, text in (
        (["--json-schema", str(schema)], '"你好"'),
        (["--json-schema", '{"const": ["你好"]}'], '["你好"]'),
        (["--regex", "你好,世(间|纪)"], "你好,世"),
        (["--grammar", str(lark)], "你好,你好"),
    ):
        result = run("hello", "--temperature", "0", *options)
        assert result.exit_code == 0 and result.stdout.startswith(text), result.output
    assert "only one of --json-schema, --regex and --grammar" in run("x", "--regex", "a", "--json-schema", "{}").stderr
    missing = run("x", "--grammar", str(tmp_path / "none"))
    assert missing.exit_code == 1 and f"{tmp_path / 'none'} cannot be read: found" in missing.stderr
    refused = run("x", "--regex", "(a")
    assert refused.exit_code == 1 and "cannot be used (unclosed group)" in refused.stderr


@pytest.mark.usefixtures("loads")
def test_accepted_drafts_are_on_stderr() -> None:
    result = run(ANSWER, "--temperature", "0", "--prompt-lookup", "3")  # an answer that quotes its prompt
    assert result.stdout == ANSWER + "\n"
    assert re.search(r", \d+ of [1-9]\d* drafts accepted\]\n", result.stderr)


@pytest.mark.usefixtures("loads")
def test_json_is_one_object() -> None:
    result = run("hello", "--json", "--temperature", "0")
    plain = json.loads(result.stdout)
    fields = {
        "prompt_token_ids",
        "token_ids",
        "text",
        "finish_reason",
        "timings",
        "drafted",
        "accepted",
        "cached",
        "cached_tokens",
    }
    assert set(plain) == {*fields, "logprobs", "prompt_logprobs"} and plain["logprobs"] is plain["prompt_logprobs"] is None
    assert plain["text"] == ANSWER and plain["finish_reason"] == "stop"
    assert set(plain["timings"]) == {"prefill_s", "decode_s", "first_token_s", "tokens_per_second", "load_s"}
    assert ANSWER in result.stdout and result.stderr == ""


@pytest.mark.usefixtures("loads")
def test_profile_is_a_table_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeExecutor, "read_bandwidth", lambda self: 20e9)
    result = run("hello", "--profile")
    assert result.stdout == ANSWER + "\n"
    for text in (
        "prefill: ",
        "decode: ",
        "  attention  ",
        "  linear  ",
        "schedule, sample, detokenize",
        "read bandwidth 20.0 GB/s, 1 thread, ",
    ):
        assert text in result.stderr
    result = run("--profile", "--json", stdin="first\nsecond\n")
    for line in result.stdout.splitlines():
        profile = json.loads(line)["profile"]
        assert [phase["name"] for phase in profile["phases"]] == ["prefill", "decode"]
    assert result.stderr == "" and "profile" not in run("hello").stderr


@pytest.mark.usefixtures("loads")
def test_sampling_options_reach_the_request() -> None:
    assert json.loads(run("x", "--json", "--max-new-tokens", "1").stdout)["finish_reason"] == "length"
    assert json.loads(run("x", "--json", "--stop", "世", "--stop", "q").stdout)["text"] == "你好,"
    drafting = json.loads(run("hello hello", "--json", "--temperature", "0", "--prompt-lookup", "4").stdout)
    assert drafting["text"] == ANSWER and drafting["drafted"] >= drafting["accepted"]
    scored = json.loads(run("hello", "--json", "--temperature", "0", "--logprobs", "2", "--min-p", "0.1").stdout)
    assert [entry["token_id"] for entry in scored["logprobs"]] == scored["token_ids"]
    assert all(len(entry["top"]) == 2 and entry["logprob"] <= 0 for entry in scored["logprobs"])
    raw = json.loads(run("hello", "--json", "--raw").stdout)["prompt_token_ids"]
    assert raw == make_engine().tokenizer.encode("hello")


def test_log_probabilities_are_for_json() -> None:
    result = run("hello", "--logprobs", "2")
    assert result.exit_code == 2 and "--logprobs needs --json" in result.stderr


def test_load_options_reach_the_engine(loads: list[dict[str, Any]]) -> None:
    run("x", "--threads", "3", "--isa", "avx2", "--kv-tokens", "64", "--verify")
    run("x", "--kv-cache-memory", "50%")
    unset = {"directory": ENGINE[-1], "threads": None, "isa": None, "kv_tokens": None, "kv_cache_memory": None,
             "draft": None, "draft_tokens": None}  # fmt: skip
    assert loads[0] == unset | {"threads": 3, "isa": "avx2", "kv_tokens": 64, "verify": "full"}
    assert loads[1] == unset | {"kv_cache_memory": "50%", "verify": "header"}
    result = run("x", "--lora", "law")
    assert loads[2] == unset | {"verify": "header", "lora": {"lora": "law"}}
    assert result.exit_code == 1 and "this engine takes no adapters" in result.stderr, "the prompt is for the adapter"


@pytest.mark.usefixtures("loads")
def test_lines_of_a_pipe_are_turns_of_one_chat() -> None:
    result = run("--json", stdin="first\n\nsecond\n/reset\nthird\n/exit\nnever\n")
    tokenizer = make_engine().tokenizer
    prompts = [tokenizer.decode(json.loads(line)["prompt_token_ids"]) for line in result.stdout.splitlines()]
    assert prompts == [
        "user: first\nassistant:",
        f"user: first\nassistant: {ANSWER}\nuser: second\nassistant:",
        "user: third\nassistant:",
    ]


@pytest.mark.usefixtures("loads")
def test_raw_turns_stand_alone() -> None:
    result = run("--json", "--raw", stdin="first\nsecond")
    ids = [json.loads(line)["prompt_token_ids"] for line in result.stdout.splitlines()]
    assert ids == [make_engine().tokenizer.encode(text) for text in ("first", "second")]


@pytest.mark.usefixtures("loads")
def test_errors_are_one_sentence_and_exit_code_1() -> None:
    for arguments, sentence in [
        (["x", "--top-p", "3"], "sampling: top_p: found 3.0, expected above 0 and at most 1.\n"),
        (["x" * 400], "request: the prompt and one token are too long: found "),
    ]:
        result = run(*arguments)
        assert result.exit_code == 1 and result.stdout == ""
        assert result.stderr.startswith(f"belle-run: {sentence}") and result.stderr.count("\n") == 1


def test_errors_of_loading(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path), "x"])
    assert result.exit_code == 1 and "is not an engine: found no manifest.json" in result.stderr
    directory = make_directory(tmp_path / "e", {"tokenizer.json": b"{}"})
    (directory / "tokenizer.json").write_bytes(b"[]")
    result = CliRunner().invoke(main, [str(directory), "x"])
    assert result.exit_code == 1 and "digest of tokenizer.json" in result.stderr and "Traceback" not in result.stderr


def test_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Engine:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "load", load)
    assert run("x").exit_code == 130


def test_bugs_are_one_sentence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Engine:
        raise ZeroDivisionError

    monkeypatch.setattr(Engine, "load", load)
    result = run("x")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("belle-run: internal error: ZeroDivisionError: ") and "BELLE_TRACEBACK=1" in result.stderr


def test_tracebacks_on_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(*_: Any, **__: Any) -> Engine:
        raise EngineError("engine", "a reason")

    monkeypatch.setattr(Engine, "load", load)
    assert run("x").stderr == "belle-run: engine: a reason.\n"
    monkeypatch.setenv("BELLE_TRACEBACK", "1")
    assert isinstance(run("x").exception, EngineError)
    assert isinstance(CliRunner().invoke(main, [str(tmp_path), "x"]).exception, EngineError)


def test_ranks_that_an_engine_has_not(tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "e", {"tokenizer.json": b"{}"})
    result = CliRunner().invoke(main, [str(directory), "--ranks", "2", "x"])
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "belle-run: engine: ranks: found 2, expected 1, what the engine was built for; run it with 1"
    )


def test_help_shows_examples() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    example = 'belle-run artifacts/belle-7b-cpu "写一首关于春天的诗"'
    for text in ("Examples:", example, "--repetition-penalty", "/help", "BELLE_RUN_"):
        assert text in result.stdout


@pytest.mark.usefixtures("loads")
def test_a_prompt_from_a_file_or_all_of_stdin(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes("\ufefffirst\nsecond\n".encode())
    for result in (run("-f", str(tmp_path / "prompt.txt"), "--json"), run("-", "--json", stdin="first\nsecond\n")):
        (line,) = result.stdout.splitlines()
        prompt = make_engine().tokenizer.decode(json.loads(line)["prompt_token_ids"])
        assert prompt == "user: first\nsecond\n\nassistant:"
    assert "give either PROMPT or --file" in run("x", "-f", "y").stderr
    missing = run("-f", str(tmp_path / "none"))
    assert missing.stderr == f"belle-run: prompt: {tmp_path / 'none'} cannot be read: found No such file or directory.\n"
    assert run("-", stdin=b"\xff\xfe").stderr.startswith("belle-run: prompt: stdin cannot be read: found 'utf-8' codec")


@pytest.mark.usefixtures("loads")
def test_a_system_message() -> None:
    decode = make_engine().tokenizer.decode
    prompt = decode(json.loads(run("x", "--json", "--system", "Be brief.").stdout)["prompt_token_ids"])
    assert prompt == "system: Be brief.\nuser: x\nassistant:"
    lines = run("--json", "--system", "Be brief.", stdin="first\n/reset\nsecond\n").stdout.splitlines()
    prompts = [decode(json.loads(line)["prompt_token_ids"]) for line in lines]
    assert prompts == [f"system: Be brief.\nuser: {turn}\nassistant:" for turn in ("first", "second")]
    assert "--raw has none" in run("x", "--system", "y", "--raw").stderr


@pytest.mark.usefixtures("loads")
def test_an_answer_that_was_cut_says_so() -> None:
    result = run("x", "--max-new-tokens", "1")
    assert result.stderr.startswith("(cut at 1 tokens)\n[1 token, ")
    assert "cut at" not in run("x").stderr


@pytest.mark.usefixtures("loads")
def test_options_from_the_environment_and_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "belle.toml"
    file.write_text('json = true\nmax-new-tokens = 1\nstop = ["世"]\n')

    def tokens(*arguments: str) -> int:
        return len(json.loads(run("x", *arguments).stdout)["token_ids"])

    assert tokens("--config", str(file)) == 1
    monkeypatch.setenv("BELLE_RUN_MAX_NEW_TOKENS", "2")
    assert tokens("--config", str(file)) == 2, "the environment goes before the file"
    assert tokens("--config", str(file), "--max-new-tokens", "3") == 3, "the command line goes before both"
    file.write_text("max-new-token = 1\n")
    wrong = run("x", "--config", str(file))
    assert wrong.exit_code == 2 and "unknown option in" in wrong.stderr and "did you mean max-new-tokens" in wrong.stderr
    file.write_text('max-new-tokens = "one"\n')
    assert "expected a whole number" in run("x", "--config", str(file)).stderr


@pytest.mark.parametrize(
    "arguments", [["engine", "x", "--oops"], [], ["batch", "engine"], ["batch", "engine", "none", "-o", "x"]]
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(arguments: list[str], engine: Path) -> None:
    result = CliRunner().invoke(main, [str(engine) if word == "engine" else word for word in arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    program = "belle-run batch" if "batch" in arguments else "belle-run"
    assert result.stderr.startswith("belle-run: ") and re.search(f"(; s|\\?\\) S)ee `{program} --help`\\.\n$", result.stderr)
    assert result.stderr.count("\n") == 1


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["none", "x"], 1, {"stage": "engine", "what": "none is not an engine", "found": "nothing there"}),
        (["ENGINE", "x", "--top-p", "3"], 1, {"stage": "sampling", "expected": "above 0 and at most 1"}),
        (["ENGINE", "x" * 400], 1, {"stage": "request", "what": "the prompt and one token are too long"}),
        (["ENGINE", "-f", "none"], 1, {"stage": "prompt", "found": "No such file or directory"}),
        (["ENGINE", "x", "--oops"], 2, {"stage": "usage", "remedy": "see `belle-run --help`"}),
        (["ENGINE", "x", "-f", "y"], 2, {"stage": "usage", "what": "give either PROMPT or --file"}),
        (["ENGINE", "x", "--regex", "a", "--json-schema", "{}"], 2, {"stage": "usage"}),
        ([], 2, {"stage": "usage", "what": "Missing argument 'ENGINE'"}),
        (["batch", "ENGINE"], 2, {"stage": "usage", "remedy": "see `belle-run batch --help`"}),
        (["batch", "ENGINE", "none", "-o", "x"], 2, {"stage": "usage", "what": "none: there is no such file"}),
        (["batch", "none", "in", "-o", "x"], 1, {"stage": "engine"}),
    ],
)
def test_errors_as_json(arguments: list[str], code: int, parts: dict[str, str]) -> None:
    result = CliRunner().invoke(main, [*(str(ENGINE[-1]) if word == "ENGINE" else word for word in arguments), "--json"])
    error = json.loads(result.stdout)["error"]
    assert result.exit_code == code and result.stderr == f"belle-run: {error['message']}\n"
    assert {key: error[key] for key in parts} == parts and error.keys() >= {"stage", "what", "found", "expected", "remedy"}
    asked_before = CliRunner().invoke(main, ["--json", "--", "--json", "x"])
    assert asked_before.exit_code == 1 and json.loads(asked_before.stdout)
    assert CliRunner().invoke(main, [str(ENGINE[-1]), "--oops", "--", "--json"]).stdout == "", "a prompt asks for nothing"


@pytest.mark.usefixtures("loads")
def test_bad_turns_inputs_bugs_and_interrupts_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = map(json.loads, run("--json", stdin="first\n" + "x" * 400).stdout.splitlines())
    assert first["text"] == ANSWER and last["error"]["stage"] == "request"
    assert json.loads(run("--json", stdin="诗写一首\n".encode("gb18030")).stdout)["error"]["stage"] == "input"
    for raised, code, stage in ((ZeroDivisionError, 1, "internal error"), (KeyboardInterrupt, 130, "interrupted")):

        def load(*_: Any, raised: type[BaseException] = raised, **__: Any) -> Engine:
            raise raised

        monkeypatch.setattr(Engine, "load", load)
        result = run("x", "--json")
        assert (result.exit_code, json.loads(result.stdout)["error"]["stage"]) == (code, stage)


@pytest.mark.parametrize("command", [[], ["batch"], ["serve"]])
def test_every_command_has_a_version(command: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, "--version"])
    assert result.stdout == f"{' '.join(['belle-run', *command])}, version {belle_compile.__version__}\n"


def test_a_wrong_command_line_imports_nothing_that_takes_long(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom belle_compile.runtime.cli import main\ntry:\n main(sys.argv[1:])\nfinally:\n"
        " print([name for name in ('numpy', 'tokenizers', 'jinja2') if name in sys.modules])"
    )
    for arguments in (["missing", "x"], [str(tmp_path), "--oops"], ["batch", "missing", "in", "-o", "out"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)
        assert done.stdout.splitlines()[-1] == "[]", arguments


def test_error_class_is_the_runtime_s() -> None:
    assert issubclass(EngineError, Exception)


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize(
    ("options", "expected"),
    [([], 0), (["--parse-special"], 1), (["--raw"], 1), (["--raw", "--no-parse-special"], 0), (["--no-parse-special"], 0)],
)
def test_control_tokens_in_prompts(options: list[str], expected: int) -> None:
    for arguments, stdin in ((["a</s>b"], None), ([], "a</s>b\n")):
        answer = json.loads(run(*arguments, "--json", "--max-new-tokens", "2", *options, stdin=stdin).stdout)
        assert answer["prompt_token_ids"].count(2) == expected


def test_variables_of_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    template = PromptTemplate("says", "{{ tone }}{% for m in messages %}{{ m.content }}{% endfor %}", "", "")
    monkeypatch.setattr(Engine, "load", lambda directory, **options: make_engine(prompt_template=template))
    for options, prompt in (((), "hello"), (("--chat-template-kwargs", '{"tone": "kind "}'), "kind hello")):
        result = run("hello", "--json", *options)
        assert json.loads(result.stdout)["prompt_token_ids"] == make_engine().encode(prompt, raw=True)
    for options, words in (
        (("--chat-template-kwargs", "{"), "--chat-template-kwargs: found "),
        (("--chat-template-kwargs", '{"tune": 1}'), "found 'tune', expected variables that template says reads: tone."),
    ):
        result = run("hello", *options)
        assert result.exit_code == 1 and words in result.stderr and result.stdout == ""
    assert run("hello", "--raw", "--chat-template-kwargs", "{}").exit_code == 2
