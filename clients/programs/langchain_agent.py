"""One turn of a LangChain agent: ``anthropic`` over Messages, ``openai`` over Chat."""

import sys

import toy
from langchain.agents import create_agent
from langchain_anthropic import ChatAnthropic
from langchain_anthropic.middleware import AnthropicPromptCachingMiddleware
from langchain_core.messages import HumanMessage, messages_from_dict, messages_to_dict
from langchain_openai import ChatOpenAI

if sys.argv[1] == "anthropic":
    model = ChatAnthropic(
        model=toy.MODEL,
        base_url=toy.BASE_URL,
        api_key=toy.API_KEY,
        max_tokens=512,
        default_headers={"X-Session-ID": toy.SESSION},
    )
    middleware = [AnthropicPromptCachingMiddleware(ttl="1h")]
else:
    model = ChatOpenAI(
        model=toy.MODEL,
        base_url=f"{toy.BASE_URL}/v1",
        api_key=toy.API_KEY,
        model_kwargs={"prompt_cache_key": toy.SESSION},
    )
    middleware = []

agent = create_agent(
    model, tools=[toy.read_file], system_prompt=toy.HANDBOOK, middleware=middleware
)
history = messages_from_dict(toy.recall())
answer = agent.invoke({"messages": [*history, HumanMessage(toy.PROMPT)]})
toy.remember(messages_to_dict(answer["messages"]))
print(answer["messages"][-1].text)
