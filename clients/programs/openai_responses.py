"""One turn with the `openai` package over Responses: a breakpoint behind the handbook."""

import json

import openai
import toy

client = openai.OpenAI(base_url=f"{toy.BASE_URL}/v1", api_key=toy.API_KEY)
handbook = {
    "type": "input_text",
    "text": toy.HANDBOOK,
    "prompt_cache_breakpoint": {"mode": "explicit"},
}
items = toy.recall() or [{"role": "developer", "content": [handbook]}]
items.append({"role": "user", "content": toy.PROMPT})
tool = {
    "type": "function",
    "name": "read_file",
    "description": toy.DESCRIPTION,
    "parameters": toy.PARAMETERS,
}
while True:
    with client.responses.stream(
        model=toy.MODEL, input=items, tools=[tool], store=False, prompt_cache_key=toy.SESSION
    ) as stream:
        answer = stream.get_final_response()
    calls = [item for item in answer.output if item.type == "function_call"]
    items += [
        item.model_dump(mode="json", exclude_unset=True, exclude={"parsed_arguments"})
        for item in answer.output
    ]
    for call in calls:
        result = toy.read_file(**json.loads(call.arguments))
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": result})
    if not calls:
        break
toy.remember(items)
print(answer.output_text)
