"""Flags of other servers that people will paste: each is answered with its own sentence, none is ignored.

A flag that asks for what happens anyway is accepted with a notice; one that asks for what this version cannot do
is refused. Names that are mere synonyms of ours stand in the table of srt/configs/server.py.
"""

from __future__ import annotations

from typing import Final

import msgspec


class Foreign(msgspec.Struct, frozen=True):
    """Flags that share one answer. `accepts` are the values that mean what happens anyway."""

    names: tuple[str, ...]
    sentence: str
    refused: bool = True
    accepts: tuple[str, ...] = ()


def _noted(sentence: str, *names: str) -> Foreign:
    return Foreign(names, sentence, refused=False)


def _refused(sentence: str, *names: str, accepts: tuple[str, ...] = ()) -> Foreign:
    return Foreign(names, sentence, accepts=accepts)


GRAMMARS: Final = "say --grammar-backend and --max-grammar-seconds"
MODEL_DEFAULTS: Final = "sampling defaults are those of generation_config.json"
IMAGE_LIMITS: Final = "images are limited by --max-images-per-request, --max-image-bytes, --max-image-pixels"
NO_TIERS: Final = "evicted KV pages are dropped; there is no host or disk tier in this version"
NO_LORA: Final = "adapters are not supported"
NO_CLUSTER: Final = "one machine, one replica, --tp-size workers is all that this version runs"
EXPERTS: Final = "--ep-size shares the routed experts out over the workers of --tp-size"
CHOSEN: Final = "this backend is chosen from the device and the weights, and printed at start-up"
GRAPHS: Final = "on a GPU decodes are recorded as CUDA graphs while it is idle, with equal results; a CPU has none"
GRAPH_SIZES: Final = "which CUDA graphs are recorded follows from --max-running-requests"

FOREIGN: Final[tuple[Foreign, ...]] = (
    # --- what happens anyway ---
    _noted("no code from a model directory is ever run", "--trust-remote-code"),
    _noted("/metrics is always on", "--enable-metrics"),
    _noted("cached_tokens is in every answer", "--enable-cache-report", "--enable-prompt-tokens-details"),
    _noted("tool calls are read wherever a request brings tools", "--enable-auto-tool-choice"),
    _noted("prefill and decode share every step", "--enable-mixed-chunk", "--enable-chunked-prefill"),
    _noted("prefixes are cached unless --disable-radix-cache is given", "--enable-prefix-caching"),
    _noted("the next step is planned ahead unless --disable-overlap-schedule is given", "--async-scheduling"),
    _noted(GRAPHS, "--enforce-eager", "--disable-cuda-graph", "--disable-decode-cuda-graph"),
    _noted("there is no such kernel here", "--disable-cascade-attn"),
    _noted(
        "how GPUs add up is chosen from what they are: one kernel for small sums of two, else NCCL",
        "--disable-custom-all-reduce",
    ),
    _noted("/metrics says it, no line is logged for it", "--disable-log-stats"),
    _noted("requests are logged only with --log-requests", "--disable-log-requests", "--no-enable-log-requests"),
    _noted("a model that takes images is always served with them", "--enable-multimodal"),
    _noted("no warm-up request is sent through the server", "--skip-server-warmup"),
    # --- memory and scheduling ---
    _refused("give the size of the KV pool in tokens: --max-total-tokens", "--kv-cache-memory-bytes"),
    _refused("a step's prompt tokens are bounded by --chunked-prefill-size", "--max-prefill-tokens"),
    _refused("how much of their limits requests will use is learned as they end", "--schedule-conservativeness"),
    _refused("metrics have the prefix sglang:", "--metrics-prefix", accepts=("sglang",)),
    _refused("cached prefixes are evicted least recently used first", "--radix-eviction-policy", accepts=("lru",)),
    _refused(
        "there are no priorities in this version; see --schedule-policy",
        "--enable-priority-scheduling",
        "--schedule-low-priority-values-first",
        "--priority-scheduling-preemption-threshold",
        "--default-priority-value",
    ),
    _refused("there is no swapping; a retracted request is computed again", "--swap-space", "--cpu-offload-gb"),
    _refused(
        NO_TIERS,
        "--enable-hierarchical-cache",
        "--hicache-ratio",
        "--hicache-size",
        "--hicache-write-policy",
        "--hicache-storage-backend",
    ),
    # --- backends and devices ---
    _refused(
        CHOSEN,
        "--prefill-attention-backend",
        "--decode-attention-backend",
        "--mm-attention-backend",
        "--sampling-backend",
        "--moe-a2a-backend",
        "--fp8-gemm-backend",
        accepts=("auto",),
    ),
    _refused(
        GRAPH_SIZES,
        "--cuda-graph-max-bs",
        "--cuda-graph-bs",
        "--cuda-graph-max-bs-decode",
        "--cuda-graph-bs-decode",
        "--max-seq-len-to-capture",
    ),
    _refused("the model is not compiled", "--enable-torch-compile", "--torch-compile-max-bs", "--compilation-config"),
    _refused(
        "native CPU kernels give the same bits in every batch anyway, other backends do not promise it",
        "--enable-deterministic-inference",
    ),
    _refused("sleeping and waking are not supported", "--enable-memory-saver", "--enable-sleep-mode"),
    # --- more than one machine or replica ---
    _refused(NO_CLUSTER, "--dp-size", "--dp", "--data-parallel-size", accepts=("1",)),
    _refused(NO_CLUSTER, "--pp-size", "--pipeline-parallel-size", "--nnodes", accepts=("1",)),
    _refused(NO_CLUSTER, "--node-rank", accepts=("0",)),
    _refused(EXPERTS, "--enable-expert-parallel"),
    _refused(NO_CLUSTER, "--enable-dp-attention", "--attn-dp-size"),
    _refused(NO_CLUSTER, "--load-balance-method"),
    _refused(NO_CLUSTER, "--dist-init-addr", "--nccl-init-addr", "--distributed-executor-backend"),
    _refused(NO_CLUSTER, "--disaggregation-mode", accepts=("null",)),
    # --- model, tokenizer, outputs ---
    _refused("guesses form a chain, one candidate each", "--speculative-eagle-topk", accepts=("1",)),
    _refused("it follows from --speculative-num-steps", "--speculative-num-draft-tokens"),
    _refused("--speculative-algorithm says which drafter runs", "--spec"),
    _noted("several MTP modules are always run as such", "--enable-multi-layer-eagle"),
    _refused(GRAMMARS, "--structured-outputs-config", "--constrained-json-disable-any-whitespace"),
    _refused(
        IMAGE_LIMITS,
        "--limit-mm-data-per-request",
        "--limit-mm-per-prompt",
        "--media-url-max-file-size-mb",
    ),
    _refused("images on this machine's disk are never read for a client", "--allowed-local-media-path"),
    _refused(
        "a model that takes images is always served with them",
        "--language-only",
        "--language-model-only",
    ),
    _refused("a prompt that is too long is answered with 400, never cut", "--allow-auto-truncate"),
    _refused("template arguments are given with a request (chat_template_kwargs)", "--default-chat-template-kwargs"),
    _refused("the tokenizer is the one in --model-path", "--tokenizer-path", "--tokenizer"),
    _refused("the tokenizer is the one in --model-path", "--tokenizer-mode", accepts=("auto",)),
    _refused("one tokenizer process serves all requests", "--tokenizer-worker-num", accepts=("1",)),
    _refused("the tokenizer is always there; input_ids work as well as text", "--skip-tokenizer-init"),
    _refused(MODEL_DEFAULTS, "--sampling-defaults", accepts=("model",)),
    _refused(MODEL_DEFAULTS, "--preferred-sampling-params", "--generation-config"),
    _refused("only config.json describes the model", "--json-model-override-args", "--hf-overrides"),
    _refused("a model path is a local directory", "--revision", "--download-dir", "--hf-token"),
    _refused("only text generation is served", "--is-embedding", "--task", "--runner"),
    _refused(NO_LORA, "--enable-lora", "--lora-paths", "--lora-modules", "--max-loras-per-batch", "--max-lora-rank"),
    _refused("weights are loaded shard by shard", "--startup-weight-load-mode", accepts=("serial",)),
    _refused("weights are loaded shard by shard", "--weight-loader-prefetch-checkpoints"),
    _refused("weights are loaded shard by shard", "--model-loader-extra-config"),
    _refused("weights have no version label in this version", "--weight-version"),
    # --- the HTTP side ---
    _refused("tokens are sent when they are sampled", "--stream-interval", accepts=("1",)),
    _refused("keys travel in headers, never in cookies; see --allowed-origins", "--allow-credentials"),
    _refused("--allowed-origins opens every method and header of the API", "--allowed-methods", "--allowed-headers"),
    _refused("clients show keys, not certificates: --api-key", "--ssl-ca-certs", "--ssl-cert-reqs"),
    _refused("the key's file must not be encrypted", "--ssl-keyfile-password"),
    _refused("--otlp-traces-endpoint turns traces on", "--enable-trace"),
    _refused("requests are not recorded; --log-requests writes them to the log", "--crash-dump-folder"),
    _refused("metrics have fixed labels", "--extra-metric-labels"),
    _refused("use --log-level", "--log-level-http", "--uvicorn-log-level"),
    _refused("routes are served at the root; put a reverse proxy in front", "--root-path", "--fastapi-root-path"),
)
