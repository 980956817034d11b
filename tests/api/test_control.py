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
    assert front.get("/docs").status == 200


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
