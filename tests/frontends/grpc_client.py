"""A client of vLLM's gRPC service, run by the Python that has its protocol: for each line
``{"tokens": […]}`` that it reads it writes a line with the tokens read and what came back."""

import json
import sys

import grpc
from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc


def main(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        for number, line in enumerate(sys.stdin):
            asked = json.loads(line)
            request = vllm_engine_pb2.GenerateRequest(
                request_id=f"request-{number}",
                tokenized=vllm_engine_pb2.TokenizedInput(input_ids=asked["tokens"]),
                sampling_params=vllm_engine_pb2.SamplingParams(
                    temperature=0.0, top_p=1.0, max_tokens=1, n=1, repetition_penalty=1.0
                ),
                kv_transfer_params_json=json.dumps(asked.get("params", {})),
            )
            responses = list(stub.Generate(request, timeout=60))
            read = max(response.complete.cached_tokens for response in responses)
            print(json.dumps({"read": read, "said": str(responses)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
