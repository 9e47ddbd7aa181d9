"""Chats as prompts, and their answers."""

from expertlane.server.answers import ChatAnswer
from expertlane.server.errors import bad_field
from expertlane.server.requests import ChatRequest
from expertlane.server.service import Service
from expertlane.spec.sampling import SamplingParams


async def make_chat(service: Service, request: ChatRequest) -> ChatAnswer:
    """An answer to a request, with its chat as tokens.

    Raises:
        ApiError: it can never be served.
    """
    prompt, text, params = await prepare_chat(service, request)
    return ChatAnswer(service, request, [prompt], params, text)


async def prepare_chat(
    service: Service, request: ChatRequest
) -> tuple[list[int], str, list[SamplingParams]]:
    """A chat's tokens, its text, and how each of its choices is drawn.

    Raises:
        ApiError: it can never be served.
    """
    tools = request.offered_tools
    if tools and not service.marks.has_calls:
        text = "tools: the chat template of this model marks no calls as <tool_call>"
        raise bad_field("tools", text, "unsupported_parameter")
    prompt, text = await service.encode_chat(
        request.messages,
        add_generation_prompt=request.add_generation_prompt,
        add_special_tokens=request.add_special_tokens,
        tools=tools,
        variables=request.chat_template_kwargs,
    )
    return prompt, text, service.params(request, [prompt], "messages")
