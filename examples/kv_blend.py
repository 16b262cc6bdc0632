"""Two text files, precomputed once and blended into a prompt: the descendant of CacheBlend's first script.

    KVBLEND_CONFIG_FILE=examples/kv_blend.yaml python examples/kv_blend.py [MODEL]

MODEL is a folder or a hub name; without it (and without KVBLEND_MODEL) the bundled reader answers.
"""

import os
import sys
from pathlib import Path

import torch

from kvblend_rag import LLM, OfflineKVPreCompute, SamplingParams, close_engine, combine_input_prompt_chunks
from kvblend_rag.demo.reader import prepare_reader

torch.multiprocessing.set_start_method("spawn")

here = Path(__file__).parent
model = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("KVBLEND_MODEL") or str(prepare_reader())

chunk_1, chunk_2 = ((here / name).read_text(encoding="utf-8") for name in ("lighthouse.txt", "ferry.txt"))

llm = LLM(model=model, gpu_memory_utilization=0.7, tensor_parallel_size=1)

# What the model's chat template puts before and after a message: system prompt and question are made of it.
conversation = [
    {"role": "system", "content": "Answer the question from the documents. Give only the answer, in a few words."},
    {"role": "user", "content": "DOCUMENTS"},
]
template = llm.get_tokenizer().apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
sys_prompt, end = template.split("DOCUMENTS")
question = "\n\nQuestion: At what time does the last ferry leave Skarholm on a Sunday?" + end

offline_precompute = OfflineKVPreCompute(llm)
for chunk in (chunk_1, chunk_2):
    offline_precompute.precompute_kv(chunk)

user_prompt = combine_input_prompt_chunks([sys_prompt, chunk_1, "\n\n", chunk_2, question])
sampling_params = SamplingParams(temperature=0.0, max_tokens=32)

for output in llm.generate(user_prompt, sampling_params):
    print(f"Answer: {output.outputs[0].text!r}")
    ttft = output.metrics.first_token_time - output.metrics.first_scheduled_time
    print(f"Time to first token: {ttft:.3f} seconds")
    print(output.report)

close_engine()
