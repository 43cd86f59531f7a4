"""One turn of a Pydantic AI agent: ``anthropic`` over Messages, ``openai`` over Chat."""

import sys

import toy
from pydantic_ai import Agent, ModelMessagesTypeAdapter
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

if sys.argv[1] == "anthropic":
    provider = AnthropicProvider(api_key=toy.API_KEY, base_url=toy.BASE_URL)
    model = AnthropicModel(toy.MODEL, provider=provider)
    settings = {
        "anthropic_cache_tool_definitions": "1h",
        "anthropic_cache_instructions": "1h",
        "anthropic_cache_messages": True,
        "anthropic_cache_diagnostics": True,
        "extra_headers": {"X-Session-ID": toy.SESSION},
    }
else:
    provider = OpenAIProvider(api_key=toy.API_KEY, base_url=f"{toy.BASE_URL}/v1")
    model = OpenAIChatModel(toy.MODEL, provider=provider)
    settings = {"openai_prompt_cache_key": toy.SESSION}

agent = Agent(model, instructions=toy.HANDBOOK, tools=[toy.read_file], model_settings=settings)
history = ModelMessagesTypeAdapter.validate_python(toy.recall())
result = agent.run_sync(toy.PROMPT, message_history=history)
toy.remember(ModelMessagesTypeAdapter.dump_python(result.all_messages(), mode="json"))
print(result.output)
