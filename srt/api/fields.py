"""Every request field this server knows, and what becomes of it: one table, from which bodies are sifted.

A field is *honoured*; or *neutral*: only values that ask for nothing are accepted, any other is answered with 400;
or *noted*: it changes nothing about the answer, so it is accepted and, unless neutral, listed in `warnings`.
Fields outside the table are listed in `warnings` as unknown. `null` always means: not given.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Final

import msgspec


class Body(Enum):
    """A kind of request body. The value is its letter in the table below."""

    GENERATE = "g"
    SAMPLING = "s"
    COMPLETION = "p"
    CHAT = "c"
    STREAM_OPTIONS = "o"
    TOKENIZE = "t"
    DETOKENIZE = "d"
    ABORT = "a"
    FUNCTION_CALL = "x"
    SEPARATE_REASONING = "y"
    PROFILE = "f"
    MESSAGES = "m"
    COUNT_TOKENS = "k"
    RESPONSES = "r"
    INPUT_TOKENS = "i"
    SCORE = "e"


NESTED: Final = {"sampling_params": Body.SAMPLING, "stream_options": Body.STREAM_OPTIONS}
"""Fields whose value is a body of its own, or a list of them."""


class Handling(Enum):
    """What becomes of a field."""

    HONOURED = "honoured"
    NEUTRAL = "only neutral values"
    NOTED = "no effect"


class Field(msgspec.Struct, frozen=True):
    """One row: `bodies` are letters of `Body`, `neutral` the values that ask for nothing."""

    name: str
    bodies: str
    handling: Handling
    note: str
    neutral: tuple[Any, ...] = ()

    def is_neutral(self, value: Any) -> bool:
        """Whether a value asks for nothing; 1 and 1.0 are equal, 1 and true are not."""
        return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in self.neutral)


def _honoured(name: str, bodies: str, note: str) -> Field:
    return Field(name, bodies, Handling.HONOURED, note)


def _neutral(name: str, bodies: str, note: str, *neutral: Any) -> Field:
    return Field(name, bodies, Handling.NEUTRAL, note, neutral)


def _noted(name: str, bodies: str, note: str, *neutral: Any) -> Field:
    return Field(name, bodies, Handling.NOTED, note, neutral)


FIELDS: Final[tuple[Field, ...]] = (
    # --- the prompt
    _honoured("text", "xy", "what a model has written"),
    _honoured("text", "g", "prompt as text, or a list of them for a batch; exactly one of text and input_ids"),
    _honoured("input_ids", "g", "prompt as token ids, or a list of such lists for a batch"),
    _honoured("image_data", "g", "image, or list of them; for a batch, a list with an image or a list for each prompt"),
    _honoured("prompt", "pt", "text, list of texts, token ids, or list of token ids; /tokenize takes texts"),
    _honoured("messages", "ct", "roles system, developer, user, assistant, tool; content a text, or text and images"),
    _honoured("tools", "ctx", "functions in JSON Schema, shown to the model by the chat template"),
    _honoured("tool_call_parser", "x", "format of the calls; default: the server's"),
    _honoured("reasoning_parser", "y", "format of the reasoning; default: the server's"),
    _honoured("tool_choice", "ct", "auto, none (hides the tools from the model), required, or one function by name"),
    _honoured("reasoning_effort", "ct", "low, medium, high for the chat template; none: no reasoning at all"),
    _honoured("chat_template_kwargs", "ct", "further variables for the chat template"),
    _honoured("add_generation_prompt", "ct", "open the assistant's turn; default true"),
    _honoured("continue_final_message", "ct", "leave the last message open, so that the answer continues it"),
    _honoured("add_special_tokens", "t", "let the tokenizer put its opening tokens before a text; default true"),
    _honoured("tokens", "d", "token ids, or a list of such lists"),
    _honoured("echo", "p", "begin the answer with the prompt"),
    # --- sampling
    _honoured("sampling_params", "g", "an object, or a list of objects, one for each prompt"),
    _honoured(
        "max_new_tokens",
        "s",
        "most tokens of the answer; default 128, or what the context leaves; 0 only computes the prompt",
    ),
    _honoured("max_tokens", "pc", "the same; default 16 for completions, all that the context leaves for chat"),
    _honoured("max_completion_tokens", "c", "the same; wins over max_tokens"),
    _honoured("min_new_tokens", "s", "end and stop ids cannot be drawn before so many tokens"),
    _honoured("min_tokens", "pc", "the same"),
    _honoured("temperature", "spcmr", "0 or more; below 0.000001 is greedy"),
    _honoured("top_p", "spcmr", "in (0, 1]"),
    _honoured("top_k", "spcm", "1 or more; 0 and -1 keep all"),
    _honoured("min_p", "spc", "in [0, 1], relative to the most likely token"),
    _honoured("frequency_penalty", "spc", "in [-2, 2], once for each time that the answer has a token"),
    _honoured("presence_penalty", "spc", "in [-2, 2], for each token that the answer has"),
    _honoured("repetition_penalty", "spc", "above 0, at most 2; for each token that prompt or answer has; 1 is none"),
    _honoured("logit_bias", "spc", "token ids and what is added to their logits, in [-100, 100]; at most 1024"),
    _honoured("n", "spc", "answers to each prompt, 1 to 128; answer i of a seeded request has the seed plus i"),
    _honoured("sampling_seed", "s", "64-bit integer; same seed and prompt, same answer"),
    _honoured("seed", "pc", "the same"),
    _honoured("stop", "spc", "a text or at most 32 texts of at most 256 characters that end the answer"),
    _honoured("stop_token_ids", "spc", "at most 256 token ids that end the answer"),
    _honoured(
        "stop_regex", "spc", "at most 32 expressions (RE2) of at most 256 bytes that end the answer; they stay in it"
    ),
    _honoured("max_thinking_tokens", "gspc", "most tokens of reasoning; then the model has to say something"),
    _honoured("thinking_budget", "spc", "the same"),
    _honoured("thinking_token_budget", "spc", "the same"),
    _honoured("ignore_eos", "spc", "go on after an end-of-sequence token"),
    _honoured("skip_special_tokens", "spcd", "leave special tokens out of the text; default true"),
    _honoured("no_stop_trim", "spc", "leave the stop text in the answer"),
    _honoured("include_stop_str_in_output", "pc", "the same"),
    # --- the answer's form
    _honoured("response_format", "pc", "text, json_object, json_schema or structural_tag"),
    _honoured("structured_outputs", "pc", "one of json, json_object, regex, choice, grammar, structural_tag"),
    _honoured("json_schema", "spc", "JSON schema that the answer fits, an object or its text"),
    _honoured("regex", "spc", "regular expression that the whole answer matches"),
    _honoured("ebnf", "spc", "grammar in EBNF with a rule root"),
    _honoured("structural_tag", "spc", "structural tag, an object or its text"),
    _honoured("require_reasoning", "g", "constrain the answer behind the thinking, where the prompt leaves one open"),
    _honoured("logprobs", "pc", "true in chats; in completions how many of the most likely tokens, 0 to 20"),
    _honoured("top_logprobs", "c", "how many of the most likely tokens at each position, 0 to 20; needs logprobs"),
    _honoured("return_logprob", "g", "log probabilities of the model's own distribution; or a list for a batch"),
    _honoured("logprob_start_len", "g", "first position of the prompt that is listed; -1, the default, is its last"),
    _honoured("top_logprobs_num", "g", "how many of the most likely tokens at each position, 0 to 128"),
    _honoured("token_ids_logprob", "g", "at most 128 tokens whose log probability is told at each position"),
    _honoured("return_text_in_logprobs", "g", "with the text of each token; default false"),
    _honoured("model", "pctdmkrie", "the served model name, its path, or 'default'"),
    _honoured("stream", "gpcmr", "server-sent events instead of one body"),
    _honoured("stream_options", "pc", "include_usage, continuous_usage_stats"),
    _honoured("include_usage", "o", "one more chunk with the usage at the end"),
    _honoured("continuous_usage_stats", "o", "the usage so far in each chunk"),
    _noted("include_obfuscation", "o", "chunks are not padded", False),
    _honoured("return_token_ids", "pc", "token ids beside the texts"),
    _honoured("return_prompt_token_ids", "g", "the prompt's token ids in the answer"),
    _honoured("rid", "gpca", "request id of the caller's choice: 1 to 128 visible ASCII characters"),
    _honoured("request_id", "pc", "the same"),
    _honoured("timeout_ms", "gpc", "end the call after so long: 408 without a token, else finish_reason abort"),
    _honoured("cache_salt", "gpc", "separates cached prefixes; at most 256 characters"),
    _honoured("extra_key", "gpc", "the same"),
    _honoured("speculative", "gpc", "off: guess no tokens ahead for this call; the answer is the same"),
    _honoured("abort_all", "a", "abort every request"),
    _honoured("abort_message", "a", "text for the finish_reason of what is aborted"),
    # --- label scoring
    _honoured("query", "e", "what every prompt has: text, or token ids"),
    _honoured("items", "e", "what each prompt has of its own: a text, texts, or lists of token ids"),
    _honoured("label_token_ids", "e", "tokens whose probability behind the prompt is told; 1 to 128"),
    _honoured("apply_softmax", "e", "probabilities among the labels alone; default false"),
    _honoured("item_first", "e", "the item comes before the query; default false"),
    # --- the Responses API
    _honoured("input", "ri", "a text, or items: message, function_call, function_call_output, reasoning"),
    _honoured("instructions", "ri", "a system message before the conversation; not carried over to the next response"),
    _honoured("previous_response_id", "ri", "go on from a response that is kept"),
    _honoured("store", "r", "keep the response for previous_response_id and GET; default true"),
    _honoured("include", "r", "reasoning.encrypted_content"),
    _honoured("max_output_tokens", "r", "most tokens of the answer; default all that the context leaves"),
    _honoured("tools", "ri", "functions"),
    _honoured("tool_choice", "ri", "auto, none, required or a function"),
    _honoured("parallel_tool_calls", "ri", "whether an answer may have several calls"),
    _honoured("reasoning", "ri", "effort: none, minimal, low, medium, high, xhigh"),
    _honoured("text", "ri", "format: text, json_object or json_schema"),
    _honoured("metadata", "r", "given back with the response"),
    _neutral("background", "r", "not supported", False),
    _neutral("conversation", "ri", "use previous_response_id"),
    _neutral("prompt", "r", "there are no stored prompts"),
    _neutral("context_management", "r", "prompts are never edited", []),
    _neutral("top_logprobs", "r", "use chat completions", 0),
    _neutral("moderation", "r", "not supported"),
    _noted("truncation", "ri", "prompts are never truncated", "disabled"),
    _noted("max_tool_calls", "r", "only for tools that a server runs"),
    _noted("stream_options", "r", "events are not padded", {}, {"include_obfuscation": False}),
    # --- the Messages API
    _honoured("messages", "mk", "turns of user and assistant; a last one of the assistant is continued"),
    _honoured("system", "mk", "text, or blocks of text"),
    _honoured("max_tokens", "m", "most tokens of the answer; cut to what the context leaves"),
    _honoured("stop_sequences", "m", "at most 32 texts of at most 256 characters that end the answer"),
    _honoured("tools", "mk", "functions with an input_schema"),
    _honoured("tool_choice", "mk", "auto, any, tool or none; disable_parallel_tool_use"),
    _honoured("thinking", "mk", "unless absent or disabled, the answer has blocks of thinking"),
    _honoured("output_config", "mk", "effort, and format json_schema"),
    _noted("metadata", "m", "not kept"),
    _noted("cache_control", "mk", "prefixes are cached without being asked"),
    _noted("service_tier", "m", "there is one", "auto", "standard_only"),
    _noted("inference_geo", "m", "there is one server"),
    _noted("speed", "mk", "there is one", "standard"),
    _neutral("container", "m", "not supported"),
    _neutral("mcp_servers", "mk", "not supported", []),
    _neutral("context_management", "mk", "prompts are never edited", {}, {"edits": []}),
    # --- profiles
    _honoured("output_dir", "f", "directory of the files, inside --profile-dir"),
    _honoured("num_steps", "f", "steps to record; without it until /stop_profile, at most 10000"),
    _honoured("activities", "f", "CPU, GPU or both"),
    _honoured("with_stack", "f", "record Python's call stacks"),
    _honoured("record_shapes", "f", "record the shapes of operands"),
    _honoured("profile_prefix", "f", "beginning of the files' names"),
    _neutral("start_step", "f", "a recording starts with the next step", 0),
    _neutral("profile_by_stage", "f", "prefill and decode share steps", False),
    _neutral("profile_stages", "f", "prefill and decode share steps", []),
    _neutral("merge_profiles", "f", "each worker writes its own file", False),
    _noted("profile_id", "f", "files are named by time"),
    # --- not supported yet
    _neutral("n", "g", "it belongs into sampling_params", 1),
    _neutral("best_of", "spc", "all n answers are returned", 1),
    _neutral("use_beam_search", "spc", "no beam search", False),
    _neutral("beam_width", "spc", "no beam search", 1),
    _neutral("length_penalty", "spc", "no beam search", 1, 0),
    _neutral("repetition_detection", "pc", "not supported yet", False),
    _neutral("bad_words", "spc", "not supported yet", []),
    _neutral("allowed_token_ids", "spc", "not supported yet"),
    _neutral("guided_json", "pc", "use structured_outputs"),
    _neutral("guided_regex", "pc", "use structured_outputs"),
    _neutral("guided_choice", "pc", "use structured_outputs"),
    _neutral("guided_grammar", "pc", "use structured_outputs"),
    _neutral("top_logprobs", "p", "logprobs says how many", 0),
    _neutral("prompt_logprobs", "pc", "use echo with logprobs, or /generate"),
    _neutral("logprob_token_ids", "pc", "use token_ids_logprob of /generate", []),
    _neutral("functions", "c", "use tools", []),
    _neutral("function_call", "c", "use tool_choice", "none", "auto"),
    _honoured("parallel_tool_calls", "c", "false: one call at most"),
    _noted("parallel_tool_calls", "t", "it says nothing about the prompt", True),
    _neutral("modalities", "gc", "text only", ["text"], []),
    _neutral("audio", "c", "text only"),
    _neutral("video_data", "g", "text only", [], ""),
    _neutral("audio_data", "g", "text only", [], ""),
    _neutral("mm_processor_kwargs", "pc", "images are cut by the server's --image-preprocessing", {}),
    _neutral("input_embeds", "g", "not supported", []),
    _neutral("input_ids", "c", "send them to /generate or /v1/completions", []),
    _neutral("suffix", "p", "the model does not fill in the middle", ""),
    _neutral("prediction", "c", "not supported yet"),
    _neutral("web_search_options", "c", "not supported"),
    _neutral("documents", "ct", "not supported yet", []),
    _neutral("chat_template", "ct", "templates come from the operator"),
    _neutral("custom_logit_processor", "gpc", "no code from clients", ""),
    _neutral("logits_processors", "pc", "no code from clients", []),
    _neutral("lora_path", "gpc", "no adapters", ""),
    _neutral("truncate_prompt_tokens", "pct", "prompts are never truncated"),
    _noted("truncation_side", "pct", "prompts are never truncated"),
    _neutral("return_hidden_states", "gpc", "not supported", False),
    _neutral("return_routed_experts", "gpc", "not supported", False),
    _neutral("return_entropy", "g", "not supported", False),
    _neutral("return_meta_info", "pc", "use /generate", False),
    _neutral("return_prompt_text", "pc", "use echo", False),
    _neutral("return_token_strs", "t", "not supported yet", False),
    _neutral("session_params", "g", "prefixes are cached without sessions", {}),
    _neutral("kv_transfer_params", "pc", "not supported", {}),
    _neutral("stream_interval", "spc", "each step is sent when it is done", 1),
    _neutral("background", "g", "not supported", False),
    # --- harmless
    _honoured("separate_reasoning", "c", "false: the reasoning stays in the content as it was written"),
    _honoured("stream_reasoning", "c", "false: in a stream the reasoning comes in one piece"),
    _honoured("include_reasoning", "c", "false: the reasoning is left out of the answer"),
    _noted("spaces_between_special_tokens", "spc", "the tokenizer puts none", True),
    _noted("priority", "gpc", "requests are served by the server's policy", 0),
    _noted("session_id", "gpc", "prefixes are cached without sessions"),
    _noted("routing_key", "gpc", "for routers"),
    _noted("user", "pcr", "not used"),
    _noted("metadata", "c", "not kept"),
    _noted("store", "c", "nothing is kept", False),
    _noted("service_tier", "cr", "there is one", "auto", "default"),
    _noted("safety_identifier", "cr", "not used"),
    _noted("prompt_cache_key", "cr", "prefixes are found without a key"),
    _noted("prompt_cache_retention", "cr", "the least recently used goes first"),
    _noted("verbosity", "c", "the model decides"),
    _noted("custom_params", "spc", "no custom processors"),
    _noted("vllm_xargs", "pc", "no custom processors", {}),
    _noted("bootstrap_host", "gpc", "prefill and decode are not split"),
    _noted("bootstrap_port", "gpc", "prefill and decode are not split"),
    _noted("bootstrap_room", "gpc", "prefill and decode are not split"),
    _noted("routed_dp_rank", "gpc", "there is one replica"),
    _noted("data_parallel_rank", "gpc", "there is one replica"),
    _noted("disagg_prefill_dp_rank", "gpc", "prefill and decode are not split"),
    _noted("log_metrics", "g", "metrics count every request", True),
    _noted("no_logs", "g", "the operator decides", False),
    _noted("custom_labels", "gpc", "metrics have fixed labels"),
)

FIELDS_OF: Final = {body: {field.name: field for field in FIELDS if body.value in field.bodies} for body in Body}
