"""One turn of an OpenHands agent with its file editor and terminal, over Chat Completions."""

import uuid

import toy
from openhands.sdk import LLM, Agent, Conversation, Tool
from openhands.tools.file_editor import FileEditorTool
from pydantic import SecretStr

llm = LLM(
    model=f"openai/{toy.MODEL}",
    base_url=f"{toy.BASE_URL}/v1",
    api_key=SecretStr(toy.API_KEY),
    extra_headers={"X-Session-ID": toy.SESSION},
    capability_overrides={"supports_prompt_cache": True},
    num_retries=0,
)
conversation = Conversation(
    agent=Agent(llm=llm, tools=[Tool(name=FileEditorTool.name)]),
    workspace=".",
    persistence_dir="conversation",
    conversation_id=uuid.uuid5(uuid.NAMESPACE_URL, toy.SESSION),
    visualizer=None,
)
conversation.send_message(toy.PROMPT)
conversation.run()
conversation.close()
