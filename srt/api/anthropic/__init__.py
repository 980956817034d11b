"""Anthropic's Messages API, over the same chats as OpenAI's.

bodies     what clients send, as types
prompt     their messages as those of a chat completion
answer     the answer as a message, and as its stream of events
endpoint   /v1/messages and /v1/messages/count_tokens, and how errors are told
"""
