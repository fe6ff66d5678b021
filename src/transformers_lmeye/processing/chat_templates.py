"""Chat templates that write slots: one `<img>` per image, one request per user turn that can see an image."""

# Turns one after another; what the released models differ in is how a user's turn is written.
RELEASED_FORMAT = r"""
{%- set state = namespace(images=0) -%}
{%- for message in messages -%}
  {%- set content = message['content'] -%}
  {%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
  {%- set images = parts | selectattr('type', 'equalto', 'image') | list | length -%}
  {%- set text = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') -%}
  {%- set state.images = state.images + images -%}
  {%- if message['role'] == 'user' -%}
    {{- '' if loop.first else '\n' -}}
    USER_TURN
  {%- elif message['role'] == 'assistant' -%}
    {{- ' ' -}}{%- generation -%}{{- text ~ END_OF_ANSWER -}}{%- endgeneration -%}
  {%- else -%}
    {{- text ~ '\n' -}}
  {%- endif -%}
{%- endfor -%}
"""

# What `Image as evidence` shows, a question, and the request behind the question.
QUESTION_TURN = r"""
    {%- if images -%}{{- 'Image as evidence: ' ~ (['<img>'] * images) | join(' ') ~ '\n ' -}}{%- endif -%}
    {{- 'Question: ' ~ text ~ (REQUEST if state.images else '') ~ '\nAnswer:' -}}
"""

# A turn of a dialogue whose requests have a slot of their own (LMEye v0.1, an encoder-decoder).
DIALOGUE_TURN = r"""
    {{- 'Human: ' -}}{%- if images -%}{{- (['<img>'] * images) | join(' ') ~ '\n' -}}{%- endif -%}
    {{- text ~ ('\n' ~ REQUEST if state.images and REQUEST else '') ~ '\nAssistant:' -}}
"""

# Turns content parts into words and slots, and leaves the words to the language model's own template. TRL looks for
# the tag that the comment names before it asks for the assistant's tokens.
CONTENT_PARTS = r"""
{#- The processor finds the assistant's tokens itself: no {% generation %} has to mark them. -#}
{%- set eyes = namespace(messages=[], images=0) -%}
{%- for message in messages -%}
  {%- set content = message['content'] -%}
  {%- set parts = content if content is iterable and content is not string and content is not mapping else
      ([{'type': 'text', 'text': content}] if content else []) -%}
  {%- set text = namespace(value='') -%}
  {%- for part in parts -%}
    {%- if part['type'] == 'image' -%}
      {%- set eyes.images = eyes.images + 1 -%}
      {%- set text.value = text.value ~ '<img>\n' -%}
    {%- elif part['type'] == 'text' -%}
      {%- set text.value = text.value ~ part['text'] -%}
    {%- endif -%}
  {%- endfor -%}
  {%- if message['role'] == 'user' and eyes.images -%}
    {%- set text.value = text.value ~ REQUEST -%}
  {%- endif -%}
  {%- set eyes.messages = eyes.messages + [dict(message, content=text.value) if parts else message] -%}
{%- endfor -%}
{%- set messages = eyes.messages -%}
"""


def build_chat_template(
    language_model_template: str | None,
    has_requests: bool,
    keep_request_token: bool = False,
    is_encoder_decoder: bool = False,
) -> str:
    """
    A Jinja template over messages with image and text parts.

    Args:
        language_model_template (`str`, *optional*): the language model's own template, used for the words; without one
            the released prompt format is.
        has_requests (`bool`): whether questions about images carry a request.
        keep_request_token (`bool`): whether a request has a slot of its own: `<img-q> <img-d>`, else `<img-d>`.
        is_encoder_decoder (`bool`): whether earlier answers are read by an encoder, which knows one end of text alone.
    """
    request = "''"
    if has_requests:
        request = "' <img-q> <img-d>'" if keep_request_token else "' <img-d>'"
    if language_model_template is None:
        turn = DIALOGUE_TURN if keep_request_token or is_encoder_decoder else QUESTION_TURN
        end = "''" if is_encoder_decoder else "(eos_token or '')"
        released = RELEASED_FORMAT.strip().replace("USER_TURN", turn.strip())
        return released.replace("REQUEST", request).replace("END_OF_ANSWER", end)
    return CONTENT_PARTS.strip().replace("REQUEST", request) + language_model_template


__all__ = ["build_chat_template"]
