"""vLLM's side of hermes/evaluation/vllm_chat.py. It runs in vLLM's own environment, which has no package of this project.

    .venv/vllm/bin/python hermes/evaluation/vllm_worker.py '{"model": "models/merged", "dtype": "bfloat16"}'

A line of JSON each way: prompts as ids with a limit and what ends an answer come in, and the ids of greedy answers go out.
"""

import importlib
import json
import os
import sys


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    vllm = importlib.import_module("vllm")  # no package of .venv, by whose imports the stage is tracked
    model = vllm.LLM(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        asked = json.loads(line)
        options = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=asked["limit"],
            stop=asked["until"],
            stop_token_ids=asked["ends"],
            ignore_eos=True,  # it is among the ends
            include_stop_str_in_output=True,
            skip_special_tokens=False,
        )
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        found = model.generate(prompts, options, use_tqdm=False)
        out.write(json.dumps([list(one.outputs[0].token_ids) for one in found]) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
