"""The adapter to vLLM: the KV connector on the engine's side, the middleware on the API's side."""
