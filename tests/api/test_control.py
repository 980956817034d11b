"""Facts, tokens, documents."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from srt.api.fields import FIELDS, FIELDS_OF, Body, Handling
from srt.api.openapi import BODIES
from tests.support.front import Front
from tests.support.tokens import VOCAB_SIZE


def test_model_info_has_the_fields_that_clients_read_under_both_names(front: Front) -> None:
    info = front.get("/model_info").json
    assert info == front.get("/get_model_info").json
    assert set(info) == {
        "model_path", "served_model_name", "tokenizer_path", "is_generation", "preferred_sampling_params",
        "weight_version", "load_format", "reasoning_parser", "tool_call_parser", "disaggregation_mode",
        "has_image_understanding", "has_audio_understanding", "model_type", "architectures",
    }  # fmt: skip
    assert (info["is_generation"], info["architectures"]) == (True, ["Step3p5ForCausalLM"])


def test_server_info_tells_what_was_resolved_and_how_it_goes(front: Front) -> None:
    front.scheduler.report(steps=7)
    front.wait_for(lambda: front.get("/server_info").json["internal_states"][0].get("steps") == 7)
    info = front.get("/get_server_info").json
    assert info["plan"]["page_size"] == 16
    assert info["max_total_num_tokens"] == 1000
    assert info["launch_command"].startswith("server launch --model-path ")
    assert f"--port {front.port}" in info["launch_command"]
    assert info["version"]


def test_tokens_go_both_ways(front: Front, tokenizer: Tokenizer) -> None:
    for text in ("hello world", "größer 🙂 数据", "<|im_end|> x"):
        ids = tokenizer.encode(text).ids
        for prefix in ("", "/v1"):
            assert front.post(prefix + "/tokenize", {"prompt": text}).json == {
                "tokens": ids, "count": len(ids), "max_model_len": 512,
            }  # fmt: skip
            body = {"tokens": ids, "skip_special_tokens": False}
            assert front.post(prefix + "/detokenize", body).json == {"text": text, "prompt": text}
    both = front.post("/tokenize", {"prompt": ["a", "hello world"]}).json
    assert both["count"] == [1, 3]
    assert front.post("/detokenize", {"tokens": both["tokens"]}).json["text"] == ["a", "hello world"]
    assert front.post("/detokenize", {"tokens": tokenizer.encode("<|im_end|> x").ids}).json["text"] == " x"


def test_the_openapi_document_describes_every_route_and_field(front: Front) -> None:
    document = front.get("/openapi.json").json
    assert document["openapi"].startswith("3.1")
    assert {"/generate", "/v1/chat/completions", "/v1/models/{model}", "/health", "/abort_request"} <= set(
        document["paths"]
    )
    names = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(names) == len(set(names))
    properties = document["components"]["schemas"]["ChatBody"]["properties"]
    assert properties["top_p"]["description"] == FIELDS_OF[Body.CHAT]["top_p"].note
    references = set(json.dumps(document).split('"#/components/schemas/')[1:])
    assert {reference.split('"')[0] for reference in references} <= set(document["components"]["schemas"])


def test_every_operation_says_what_it_does(front: Front) -> None:
    for path, operations in front.get("/openapi.json").json["paths"].items():
        for operation in operations.values():
            summary = operation["summary"]
            assert len(summary.split()) > 2, f"{path}: {summary!r}"
            assert "endpoint" not in summary, path
            assert not summary.startswith("`"), path


def test_the_page_of_the_api_asks_nobody_but_this_server(front: Front) -> None:
    page = front.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "//" not in page.text.replace("<!doctype html>", ""), "no address of another server"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert front.get("/redoc").status == 404


def test_the_load_agrees_with_the_metrics(front: Front) -> None:
    front.scheduler.report(running=3, queued=2, steps=8)
    front.wait_for(lambda: front.get("/v1/loads").json["loads"][0]["num_running_reqs"] == 3)
    told = front.get("/v1/loads").json
    [load] = told["loads"]
    assert load["num_running_reqs"] == front.metric("num_running_reqs")
    assert load["num_waiting_reqs"] == front.metric("num_queue_reqs") == 2
    assert load["token_usage"] == pytest.approx(front.metric("token_usage"))
    assert load["cache_hit_rate"] == pytest.approx(front.metric("cache_hit_rate"))
    assert told["aggregate"]["total_total_reqs"] == 5
    assert front.get("/version").json["version"] == told["version"]
    front.scheduler.report(steps=9)


def test_what_is_rendered_is_what_is_served(front: Front, tokenizer: Tokenizer) -> None:
    body = {"messages": [{"role": "user", "content": "größer 🙂"}], "max_tokens": 1}
    rendered = front.post("/v1/chat/completions/render", body).json
    served = front.post("/v1/chat/completions", body | {"return_token_ids": True}).json
    assert rendered["token_ids"] == served["prompt_token_ids"]
    assert rendered["prompt"] == tokenizer.decode(rendered["token_ids"], skip_special_tokens=False)
    assert rendered["count"] == served["usage"]["prompt_tokens"]
    assert front.post("/v1/chat/completions/render", {"messages": []}).status == 400


def test_profiles_go_where_the_operator_allows_and_nowhere_else(model: Path, front: Front, tmp_path: Path) -> None:
    refused = front.post("/start_profile", {})
    assert (refused.status, refused.json["error"]["message"]) == (400, "profiles need a server with --profile-dir DIR")
    with Front(model, vocab_size=VOCAB_SIZE, profile_dir=str(tmp_path)) as allowed:
        assert allowed.request("POST", "/start_profile").json == {"status": "ok", "files": [str(tmp_path)]}
        inside = allowed.post("/start_profile", {"output_dir": str(tmp_path / "deep"), "num_steps": 3})
        assert inside.json["files"] == [str(tmp_path / "deep")]
        for body, word in (
            ({"output_dir": "/etc"}, "must be inside"),
            ({"output_dir": "../other"}, "must be inside"),
            ({"num_steps": 0}, "between 1 and 10000"),
            ({"activities": ["TPU"]}, "they are CPU and GPU"),
            ({"profile_prefix": "../x"}, "letters, digits"),
            ({"profile_by_stage": True}, "prefill and decode share steps"),
        ):
            answer = allowed.post("/start_profile", body)
            assert answer.status == 400
            assert word in answer.json["error"]["message"]
        assert allowed.post("/stop_profile").status == 400


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in BODIES.values()}, key=str))
def test_the_table_of_fields_and_the_body_types_agree(kind: Body) -> None:
    struct = next(struct for body, struct in BODIES.values() if body is kind)
    honoured = {name for name, field in FIELDS_OF[kind].items() if field.handling is Handling.HONOURED}
    assert set(struct.__struct_fields__) == honoured


def test_no_field_is_in_the_table_twice_for_one_body() -> None:
    for body in Body:
        names = [field.name for field in FIELDS if body.value in field.bodies]
        assert len(names) == len(set(names)), body


@pytest.mark.parametrize("module", ["srt.api.process", "srt.tokenizer.process"])
def test_these_processes_import_no_torch_and_no_transformers(module: str) -> None:
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert found.stdout.strip() == "[]"
