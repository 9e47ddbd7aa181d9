"""Chats as prompts, and their answers."""

from expertlane.server.chat_answer import ChatAnswer
from expertlane.server.endpoint import Endpoint
from expertlane.server.errors import bad_field
from expertlane.server.prepared import Prepared
from expertlane.server.requests import ChatRequest
from expertlane.server.service import Service
from expertlane.server.tools import structured_chat


async def prepare_chat(service: Service, request: ChatRequest) -> Prepared:
    """A request with its chat as tokens.

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
        variables=request.chat_template_kwargs,
    )
    structured, field = structured_chat(request, service.marks, text, service.model.tokenizer)
    grammar = None if structured is None else await service.compile(structured, field)
    shown = service.shown_token_ids(request)
    params = service.params(
        request, [prompt], "messages", structured=structured, shown_token_ids=shown
    )
    return Prepared(request, [prompt], params, [text], grammar)


CHATS = Endpoint("/v1/chat/completions", ChatRequest, prepare_chat, ChatAnswer)
