"""Let optimum continue prompts: jobs as JSON on stdin, tokens or what it raised as JSON on stdout.

It runs in a venv of its own, with transformers 4.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402
from optimum.onnxruntime import ORTModelForCausalLM  # type: ignore[import-not-found]  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402


def run(job: dict[str, Any]) -> dict[str, Any]:
    rows, count = job["rows"], job["count"]
    width = max(map(len, rows))
    left = [[job["pad"]] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    try:
        model = ORTModelForCausalLM.from_pretrained(job["package"], file_name=job["file"], subfolder="onnx")
        if job["kv_heads"]:  # how to get round its list of families with grouped-query attention
            model.num_key_value_heads = model.config.num_key_value_heads
        ids, seen = torch.tensor(left), torch.tensor(mask)
        found = model.generate(
            input_ids=ids, attention_mask=seen, max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=job["pad"],
        )  # fmt: skip
        result: dict[str, Any] = {"tokens": found[:, width:].tolist()}
        if "text" in job:
            tokenizer = AutoTokenizer.from_pretrained(job["package"])
            result["names"] = sorted(tokenizer(job["text"]))
        return result
    except Exception as error:  # noqa: BLE001  # whatever it raises is the finding
        return {"error": f"{type(error).__name__}: {error}"}


print(json.dumps([run(job) for job in json.load(sys.stdin)]))
