# A replica: vLLM with the plugin.
FROM vllm/vllm-openai:v0.32.0
RUN pip install --no-cache-dir "vllm-cachescope[redis]"
