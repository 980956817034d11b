"""What a user may set. Raw: `resolve` turns it, the checkpoint and the device into a `RuntimePlan`."""

from __future__ import annotations

import msgspec


class ServerConfig(msgspec.Struct, frozen=True):
    """Options of `server launch`, one field each; "auto" is resolved at start-up and printed with the reason."""

    model_path: str
    host: str = "127.0.0.1"
    port: int = 30000
    tp_size: int = 1
    context_length: int | None = None
    served_model_name: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    load_format: str = "auto"
    chat_template: str | None = None
    max_running_requests: int | None = None
    max_queued_requests: int = 512
    max_total_tokens: int | None = None
    swa_full_tokens_ratio: float | None = None
    chunked_prefill_size: int | None = None
    schedule_policy: str = "fcfs"
    page_size: int = 16
    disable_radix_cache: bool = False
    disable_overlap_schedule: bool = False
    random_seed: int | None = None
    watchdog_timeout: float = 300.0
    drain_timeout: float = 60.0
    log_level: str = "info"
    log_requests: bool = False
    log_requests_level: int = 2
    log_requests_format: str = "text"
    max_body_bytes: int = 64 << 20
