"""What a user may set: one table of fields from which flags, `--help` and docs/options.md are made.

Raw: `resolve` turns it, the checkpoint and the device into a `RuntimePlan`. The two API keys are no fields of it:
they never enter a plan file, a log line or a process list (see srt/configs/arguments.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

import msgspec

MODEL: Final = "Model"
NETWORK: Final = "Network"
LIMITS: Final = "Limits"
MEMORY: Final = "KV memory and batching"
IMAGES: Final = "Images"
EXECUTION: Final = "Execution"
SPECULATION: Final = "Speculative decoding"
GRAMMARS: Final = "Constrained output"
LOGGING: Final = "Logging"


class Option(msgspec.Struct, frozen=True):
    """How one field looks to a user. Bounds are inclusive and in `unit`."""

    group: str
    help: str
    unit: str = ""
    aliases: tuple[str, ...] = ()
    peer_names: tuple[str, ...] = ()
    """What other servers call it: accepted with a one-line notice."""
    choices: tuple[str, ...] = ()
    beyond: str = ""
    """Why other choices, which users of other servers know, are refused."""
    minimum: float | None = None
    maximum: float | None = None
    unset: str = ""
    """What holds when the user says nothing and the default is None."""


class ServerConfig(msgspec.Struct, frozen=True):
    """Options of `server launch`, one field each; "auto" is resolved at start-up and printed with the reason."""

    model_path: Annotated[
        str,
        Option(
            MODEL,
            "Directory of the checkpoint (config.json, safetensors, tokenizer); "
            "`builtin:tiny` is the small trained model inside the package.",
            aliases=("--model",),
        ),
    ] = "builtin:tiny"
    served_model_name: Annotated[
        str | None, Option(MODEL, "Name of the model in the API.", unset="the model path as given")
    ] = None
    load_format: Annotated[
        str,
        Option(
            MODEL, "Where weights come from: the checkpoint, or random ones.", choices=("auto", "safetensors", "dummy")
        ),
    ] = "auto"
    dtype: Annotated[
        str,
        Option(MODEL, "Number format of weights and activations.", choices=("auto", "bfloat16", "float32")),
    ] = "auto"
    quantization: Annotated[
        str,
        Option(
            MODEL,
            "Weight format of the routed experts; auto reads it, anything else must agree with the checkpoint.",
            aliases=("-q",),
            choices=("auto", "fp8", "nvfp4", "modelopt", "modelopt_fp4", "compressed-tensors"),
        ),
    ] = "auto"
    context_length: Annotated[
        int | None,
        Option(
            MODEL,
            "Longest prompt and answer together.",
            unit="tokens",
            peer_names=("--max-model-len",),
            minimum=2,
            unset="the checkpoint's",
        ),
    ] = None
    chat_template: Annotated[
        str | None, Option(MODEL, "File with a Jinja chat template.", unset="the checkpoint's")
    ] = None

    reasoning_parser: Annotated[
        str,
        Option(
            MODEL,
            "Format in which the model writes its reasoning; none leaves it in the content.",
            choices=("auto", "step3p5", "none"),
        ),
    ] = "auto"
    tool_call_parser: Annotated[
        str,
        Option(
            MODEL,
            "Format in which the model calls tools; none leaves calls in the content.",
            choices=("auto", "step3p5", "none"),
        ),
    ] = "auto"

    host: Annotated[str, Option(NETWORK, "Address to listen on; 0.0.0.0 is every IPv4 interface.")] = "127.0.0.1"
    port: Annotated[int, Option(NETWORK, "TCP port to listen on; 0 picks a free one.", minimum=0, maximum=65535)] = (
        30000
    )
    ssl_certfile: Annotated[
        str | None,
        Option(NETWORK, "PEM file with the certificate chain; given, HTTPS is spoken and nothing else.", unset="none"),
    ] = None
    ssl_keyfile: Annotated[
        str | None,
        Option(NETWORK, "PEM file with the certificate's private key.", unset="in the certificate's file"),
    ] = None
    allowed_origins: Annotated[
        str,
        Option(
            NETWORK,
            "Origins, separated by commas, whose web pages may call this server; * is all of them.",
            unset="none but the server's own",
        ),
    ] = ""
    sse_keepalive_seconds: Annotated[
        float,
        Option(
            NETWORK,
            "A silent event stream gets a comment so often; 0 is never, because some clients do not expect comments.",
            unit="seconds",
            minimum=0,
        ),
    ] = 0.0

    max_connections: Annotated[
        int,
        Option(
            LIMITS,
            "Open TCP connections; for one more the longest idle one is closed, and if none is idle it gets 503.",
            unit="connections",
            minimum=1,
        ),
    ] = 4096
    max_running_requests: Annotated[
        int | None,
        Option(
            LIMITS,
            "Requests that may compute at the same time.",
            unit="requests",
            peer_names=("--max-num-seqs",),
            minimum=1,
            maximum=4096,
            unset="64 on a CPU, 256 on a GPU",
        ),
    ] = None
    max_queued_requests: Annotated[
        int,
        Option(
            LIMITS,
            "Requests that may wait; the next one is answered with 429.",
            unit="requests",
            peer_names=("--max-num-queued-reqs",),
            minimum=0,
        ),
    ] = 512
    max_body_bytes: Annotated[
        int, Option(LIMITS, "Largest request body; a larger one is answered with 413.", unit="bytes", minimum=1024)
    ] = 64 << 20
    response_store_bytes: Annotated[
        int,
        Option(
            LIMITS,
            "Responses of /v1/responses that are kept in memory, the oldest go first; 0 keeps none.",
            unit="bytes",
            minimum=0,
        ),
    ] = 64 << 20
    drain_timeout: Annotated[
        float,
        Option(LIMITS, "How long running requests may go on after SIGTERM.", unit="seconds", minimum=0),
    ] = 60.0
    watchdog_timeout: Annotated[
        float,
        Option(
            LIMITS, "A process that is silent, or in one step, for so long ends the server.", unit="seconds", minimum=1
        ),
    ] = 300.0

    kv_cache_dtype: Annotated[
        str,
        Option(
            MEMORY,
            "Number format of cached keys and values; auto is the one of --dtype.",
            choices=("auto", "fp8_e4m3", "fp8"),
        ),
    ] = "auto"
    max_total_tokens: Annotated[
        int | None,
        Option(
            MEMORY,
            "Tokens that the KV pool of the full-attention layers holds, over all requests and cached prefixes.",
            unit="tokens",
            minimum=1,
            unset="from free memory",
        ),
    ] = None
    mem_fraction_static: Annotated[
        float | None,
        Option(
            MEMORY,
            "Share of the free memory that the plan may fill. A last resort: say context length and running requests, "
            "and `server plan` says what they take.",
            peer_names=("--gpu-memory-utilization",),
            minimum=0.05,
            maximum=1,
            unset="0.9 on a CPU, 0.97 on a GPU, where steps and graphs are planned too",
        ),
    ] = None
    swa_full_tokens_ratio: Annotated[
        float | None,
        Option(
            MEMORY,
            "Size of the sliding-window pools, relative to the full pool.",
            minimum=0.001,
            maximum=1,
            unset="1 if memory allows, else as much as is left",
        ),
    ] = None
    page_size: Annotated[
        int,
        Option(MEMORY, "Tokens of one KV page.", unit="tokens", peer_names=("--block-size",), minimum=1, maximum=64),
    ] = 16
    disable_radix_cache: Annotated[
        bool,
        Option(
            MEMORY,
            "Forget each request's KV when it ends, share no prefixes.",
            peer_names=("--no-enable-prefix-caching",),
        ),
    ] = False
    chunked_prefill_size: Annotated[
        int | None,
        Option(
            MEMORY,
            "Prompt tokens that one request computes in one step; -1 computes every prompt in one piece.",
            unit="tokens",
            peer_names=("--max-num-batched-tokens",),
            minimum=-1,
            unset="512 on a CPU, 8192 on a GPU",
        ),
    ] = None
    schedule_policy: Annotated[
        str,
        Option(MEMORY, "Who is next: first come, or longest cached prefix (nobody starves).", choices=("fcfs", "lpm")),
    ] = "fcfs"

    image_preprocessing: Annotated[
        str,
        Option(
            IMAGES,
            "How images are resized and cut: as published with the model, or bit by bit as transformers does.",
            choices=("vendor", "hf"),
        ),
    ] = "vendor"
    allowed_media_domains: Annotated[
        str,
        Option(
            IMAGES,
            "Hosts, separated by commas, from which images may be fetched, at public addresses only.",
            unset="none",
        ),
    ] = ""
    max_image_bytes: Annotated[
        int, Option(IMAGES, "Largest image file; a larger one is answered with 400.", unit="bytes", minimum=1)
    ] = 20 << 20
    max_image_pixels: Annotated[
        int,
        Option(IMAGES, "Most pixels of an image, counted before it is decoded.", unit="pixels", minimum=1),
    ] = 1 << 26
    max_image_seconds: Annotated[
        float,
        Option(IMAGES, "What fetching an image may take, and what decoding it may take.", unit="seconds", minimum=0.1),
    ] = 10.0
    max_images_per_request: Annotated[int, Option(IMAGES, "Most images of one prompt.", unit="images", minimum=0)] = 64
    encoder_cache_bytes: Annotated[
        int,
        Option(
            IMAGES,
            "Features of images that a worker keeps, so that an image seen again is not computed again.",
            unit="bytes",
            minimum=0,
        ),
    ] = 256 << 20

    device: Annotated[
        str, Option(EXECUTION, "Where the model runs; auto is a GPU if there is one.", choices=("auto", "cpu", "cuda"))
    ] = "auto"
    tp_size: Annotated[
        int,
        Option(
            EXECUTION,
            "Worker processes that share each layer (tensor parallel).",
            unit="processes",
            aliases=("--tp", "--tensor-parallel-size"),
            minimum=1,
            maximum=64,
        ),
    ] = 1
    ep_size: Annotated[
        int,
        Option(
            EXECUTION,
            "Groups of worker processes that share the routed experts out; divides --tp-size.",
            unit="groups",
            aliases=("--ep", "--expert-parallel-size"),
            minimum=1,
            maximum=64,
        ),
    ] = 1
    moe_runner_backend: Annotated[
        str,
        Option(
            EXECUTION,
            "What computes the routed experts; a layer that it cannot compute exactly takes the next one.",
            choices=("auto", "native", "flashinfer_trtllm", "flashinfer_cutlass", "triton", "reference"),
        ),
    ] = "auto"
    attention_backend: Annotated[
        str,
        Option(EXECUTION, "What computes attention.", choices=("auto", "triton", "flashinfer", "reference")),
    ] = "auto"
    disable_overlap_schedule: Annotated[
        bool,
        Option(
            EXECUTION,
            "Plan a step only after the result of the one before is back.",
            peer_names=("--no-async-scheduling",),
        ),
    ] = False
    random_seed: Annotated[
        int | None,
        Option(
            EXECUTION,
            "Seed of requests that bring none, and of dummy weights.",
            peer_names=("--seed",),
            minimum=0,
            maximum=2**31 - 1,
            unset="drawn at start-up and printed",
        ),
    ] = None

    speculative_algorithm: Annotated[
        str | None,
        Option(
            SPECULATION,
            "What guesses tokens ahead: MTP modules, earlier text, or nothing; never changes an answer. "
            "auto is mtp where the checkpoint has modules; NEXTN and EAGLE are taken as mtp.",
            unset="auto",
            choices=("auto", "mtp", "ngram", "off", "NEXTN", "EAGLE", "NGRAM"),
        ),
    ] = None
    speculative_num_steps: Annotated[
        int | None,
        Option(
            SPECULATION,
            "Tokens guessed for a request and step; cut to the number of MTP modules.",
            unit="tokens",
            peer_names=("--num-speculative-tokens",),
            minimum=1,
            maximum=64,
            unset="all MTP modules, or 7 with ngram",
        ),
    ] = None
    speculative_config: Annotated[
        str | None,
        Option(
            SPECULATION,
            "The same as a JSON object: method, num_speculative_tokens, model; the flags win.",
            unset="nothing",
        ),
    ] = None
    draft_model_path: Annotated[
        str | None,
        Option(
            SPECULATION,
            "Directory of another checkpoint of the same model, to take the MTP modules from.",
            peer_names=("--speculative-draft-model-path",),
            unset="the model path",
        ),
    ] = None

    grammar_backend: Annotated[
        str,
        Option(
            GRAMMARS,
            "Library that holds answers to JSON schemas, regular expressions and grammars.",
            peer_names=("--guided-decoding-backend",),
            choices=("xgrammar", "llguidance", "none"),
        ),
    ] = "xgrammar"
    max_grammar_seconds: Annotated[
        float,
        Option(
            GRAMMARS,
            "What compiling a constraint may take of a core; one that takes longer is answered with 400.",
            unit="seconds",
            minimum=0.1,
        ),
    ] = 10.0

    incremental_streaming_output: Annotated[
        bool,
        Option(
            NETWORK, "Events of a streamed /generate carry what is new, not all so far.", aliases=("--stream-output",)
        ),
    ] = False

    log_level: Annotated[
        str, Option(LOGGING, "Least important lines to print.", choices=("debug", "info", "warning", "error"))
    ] = "info"
    log_format: Annotated[str, Option(LOGGING, "How log lines are written.", choices=("text", "json"))] = "text"
    log_requests: Annotated[bool, Option(LOGGING, "Log each request when it arrives and when it ends.")] = False
    log_requests_level: Annotated[
        int,
        Option(
            LOGGING,
            "0: ids, sizes, times; 1: and sampling parameters; 2: and the first 2048 characters of texts; 3: all.",
            minimum=0,
            maximum=3,
        ),
    ] = 2
    log_requests_format: Annotated[str, Option(LOGGING, "How request lines are written.", choices=("text", "json"))] = (
        "text"
    )

    otlp_traces_endpoint: Annotated[
        str | None,
        Option(
            LOGGING,
            "URL that takes OpenTelemetry traces (OTLP over HTTP); needs the extra `tracing`.",
            unset="no traces",
        ),
    ] = None
    profile_dir: Annotated[
        str | None,
        Option(LOGGING, "Directory under which /start_profile may write traces.", unset="no profiles"),
    ] = None

    @property
    def origins(self) -> tuple[str, ...]:
        """`allowed_origins`, one by one."""
        return tuple(origin.strip() for origin in self.allowed_origins.split(",") if origin.strip())

    @property
    def media_domains(self) -> tuple[str, ...]:
        """`allowed_media_domains`, one by one."""
        return tuple(domain.strip() for domain in self.allowed_media_domains.split(",") if domain.strip())


class Field(msgspec.Struct, frozen=True):
    """One row of the table: a field of `ServerConfig` with its type, default and description."""

    name: str
    kind: type[str] | type[int] | type[float] | type[bool]
    default: str | int | float | bool | None
    option: Option

    @property
    def flag(self) -> str:
        """The field's name on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def default_text(self) -> str:
        """The default as a user reads it."""
        if self.default is None or self.default == "":
            return self.option.unset
        if self.kind is bool:
            return "off"
        if self.kind is float:
            return f"{self.default:g}"
        return str(self.default)


def _field(info: Any, hint: Any) -> Field:
    kind, option = get_args(hint)
    if get_origin(kind) is not None or type(None) in get_args(kind):
        kind = next(part for part in get_args(kind) if part is not type(None))
    return Field(info.name, kind, info.default, option)


def fields() -> tuple[Field, ...]:
    """All rows of the table, in the order of the struct."""
    hints = get_type_hints(ServerConfig, include_extras=True)
    return tuple(_field(info, hints[info.name]) for info in msgspec.structs.fields(ServerConfig))
