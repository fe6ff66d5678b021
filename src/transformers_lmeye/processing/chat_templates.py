"""Chat templates that write slots: one `<img>` per image, one `<img-d>` per user turn that can see an image."""

# The released prompts: what `Image as evidence` shows, a question, and the request behind the question.
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
    {%- if images -%}{{- 'Image as evidence: ' ~ (['<img>'] * images) | join(' ') ~ '\n ' -}}{%- endif -%}
    {{- 'Question: ' ~ text ~ (REQUEST if state.images else '') ~ '\nAnswer:' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- ' ' -}}{%- generation -%}{{- text ~ (eos_token or '') -}}{%- endgeneration -%}
  {%- else -%}
    {{- text ~ '\n' -}}
  {%- endif -%}
{%- endfor -%}
"""

# Turns content parts into words and slots, and leaves the words to the language model's own template.
CONTENT_PARTS = r"""
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


def build_chat_template(language_model_template: str | None, has_requests: bool) -> str:
    """
    A Jinja template over messages with image and text parts.

    Args:
        language_model_template (`str`, *optional*): the language model's own template, used for the words; without one
            the released prompt format is.
        has_requests (`bool`): whether questions about images carry a request, `<img-d>`.
    """
    request = "' <img-d>'" if has_requests else "''"
    if language_model_template is None:
        return RELEASED_FORMAT.strip().replace("REQUEST", request)
    return CONTENT_PARTS.strip().replace("REQUEST", request) + language_model_template


__all__ = ["build_chat_template"]
