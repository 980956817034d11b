"""OpenAI's Responses API, over the same chats as its chat completions.

bodies     what clients send, as types
prompt     items of a conversation as the messages of a chat completion
answer     the answer as a response object, and as its stream of events
store      responses that are kept for `previous_response_id` and GET, within a limit
endpoint   /v1/responses and what is below it
"""
