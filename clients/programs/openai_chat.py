"""One turn with the `openai` package over Chat Completions: no markers, a ``prompt_cache_key``."""

import json

import openai
import toy

client = openai.OpenAI(base_url=f"{toy.BASE_URL}/v1", api_key=toy.API_KEY)
system = {"role": "system", "content": toy.HANDBOOK}
messages = toy.recall() or [system]
messages.append({"role": "user", "content": toy.PROMPT})
function = {"name": "read_file", "description": toy.DESCRIPTION, "parameters": toy.PARAMETERS}
while True:
    with client.chat.completions.stream(
        model=toy.MODEL,
        messages=messages,
        tools=[{"type": "function", "function": function}],
        prompt_cache_key=toy.SESSION,
        stream_options={"include_usage": True},
    ) as stream:
        answer = stream.get_final_completion().choices[0].message
    message = {"role": "assistant", "content": answer.content}
    if answer.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in answer.tool_calls
        ]
    messages.append(message)
    for call in answer.tool_calls or []:
        arguments = json.loads(call.function.arguments)
        result = {"role": "tool", "tool_call_id": call.id, "content": toy.read_file(**arguments)}
        messages.append(result)
    if not answer.tool_calls:
        break
toy.remember(messages)
print(answer.content)
