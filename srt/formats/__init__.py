"""How models write: reasoning and tool calls as text, and the way back from text to what was meant. Pure, no torch.

description   the marks of a format, as data
events        what is found in an answer
reader        text in any pieces to events
values        argument values to JSON by the function's schema
answer        `parse` for a whole text, `ChatAnswer` for one that grows
grammar       what makes a model call one of the functions
"""
