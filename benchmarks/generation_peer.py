"""The PyTorch side of `generation.py`: answers requests on standard input with one greedy generation each.

It loads the weights that `generation.py` wrote, as transformers' Qwen3ForCausalLM.
"""

import argparse
import time

import torch
from peer import serve, torch_peak_gb
from transformers import Qwen3ForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--weights", required=True)
parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
arguments = parser.parse_args()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
model = Qwen3ForCausalLM.from_pretrained(arguments.weights, dtype=getattr(torch, arguments.dtype)).eval().to(DEVICE)


@torch.inference_mode()
def measure(request: dict) -> dict:
    prompts = torch.tensor(request["prompts"], device=DEVICE)
    options = {"max_new_tokens": request["tokens"], "min_new_tokens": request["tokens"]}
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    out = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, use_cache=True, pad_token_id=0, **options
    )
    said = out[:, prompts.shape[1] :].tolist()  # waits for the device
    return {"ms": 1e3 * (time.perf_counter() - started), "peak_gb": torch_peak_gb(), "said": said}


serve(measure)
