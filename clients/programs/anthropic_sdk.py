"""One turn with the `anthropic` package: markers on the handbook and on the latest message."""

import anthropic
import toy

MARK = {"type": "ephemeral"}


def marked(messages: list[dict]) -> list[dict]:
    *history, last = messages
    *blocks, block = last["content"]
    return [*history, {**last, "content": [*blocks, {**block, "cache_control": MARK}]}]


client = anthropic.Anthropic(
    base_url=toy.BASE_URL, api_key=toy.API_KEY, default_headers={"X-Session-ID": toy.SESSION}
)
messages = toy.recall()
messages.append({"role": "user", "content": [{"type": "text", "text": toy.PROMPT}]})
while True:
    with client.messages.stream(
        model=toy.MODEL,
        max_tokens=512,
        tools=[
            {
                "name": "read_file",
                "description": toy.DESCRIPTION,
                "input_schema": toy.PARAMETERS,
            }
        ],
        system=[
            {
                "type": "text",
                "text": toy.HANDBOOK,
                "cache_control": {**MARK, "ttl": "1h"},
            }
        ],
        messages=marked(messages),
    ) as stream:
        answer = stream.get_final_message()
    messages.append({"role": "assistant", "content": [b.to_dict() for b in answer.content]})
    results = [
        {
            "type": "tool_result",
            "tool_use_id": block.id,
            "content": toy.read_file(**block.input),
        }
        for block in answer.content
        if block.type == "tool_use"
    ]
    if not results:
        break
    messages.append({"role": "user", "content": results})
toy.remember(messages)
print(answer.content[-1].text)
