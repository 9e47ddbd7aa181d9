"""Chats as prompts, and their answers."""

from typing import Any

from expertlane.server.chat_answer import ChatAnswer
from expertlane.server.endpoint import Endpoint
from expertlane.server.errors import bad_field
from expertlane.server.prepared import Prepared
from expertlane.server.requests import USUAL_VERBOSITY, ChatRequest
from expertlane.server.service import Service
from expertlane.server.tools import structured_chat


async def prepare_chat(service: Service, request: ChatRequest) -> Prepared:
    """Check a request, and tokenize its chat.

    Raises:
        ApiError: it can never be served.
    """
    tools = request.offered_tools
    if tools and service.marks.calls is None:
        text = (
            "tools: the chat template of this model has none of the known marks of calls "
            "(--tool-call-parser names them)"
        )
        raise bad_field("tools", text, "unsupported_parameter")
    prompt, text = await service.encode_chat(
        request.messages,
        add_generation_prompt=request.add_generation_prompt,
        add_special_tokens=request.add_special_tokens,
        tools=tools,
        variables=_variables(service, request),
    )
    structured, field = structured_chat(request, service.marks, text, service.model.tokenizer)
    grammar = None if structured is None else await service.compile(structured, field)
    shown = service.shown_token_ids(request)
    params = service.params(
        request, [prompt], "messages", structured=structured, shown_token_ids=shown
    )
    return Prepared(request, [prompt], params, [text], grammar)


def _variables(service: Service, request: ChatRequest) -> dict[str, Any]:
    """The variables of the chat template that a request sets.

    Raises:
        ApiError: a field sets one that the template does not have.
    """
    variables, template = dict(request.chat_template_kwargs or {}), service.model.template
    for name, value in request.named_variables.items():
        if template is None or name in template.variables:
            variables[name] = value
        elif value != USUAL_VERBOSITY or name != "verbosity":
            text = f"{name}: the chat template of this model has no such variable"
            raise bad_field(name, text, "unsupported_parameter")
    return variables


CHATS = Endpoint("/v1/chat/completions", ChatRequest, prepare_chat, ChatAnswer)
