"""Let onnxruntime-genai continue prompts: jobs as JSON on stdin, tokens or what it raised as JSON on stdout.

It runs in a venv of its own, and opens what genai_config.json says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og  # type: ignore[import-not-found]


def run(job: dict[str, Any]) -> dict[str, Any]:
    rows, count = job["rows"], job["count"]
    width = max(map(len, rows))
    pad = json.loads((Path(job["package"]) / "genai_config.json").read_text())["model"]["pad_token_id"]
    ids = [[pad] * (width - len(r)) + r if job["padding"] == "left" else r + [pad] * (width - len(r)) for r in rows]
    try:
        model = og.Model(job["package"])
        parameters = og.GeneratorParams(model)
        length = width + count
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(rows))
        generator = og.Generator(model, parameters)
        if "adapter" in job:
            adapters = og.Adapters(model)
            adapters.load(str(Path(job["package"]) / "adapters" / f"{job['adapter']}.onnx_adapter"), job["adapter"])
            generator.set_active_adapter(adapters, job["adapter"])
        generator.append_tokens(np.array(ids, np.int32))
        steps = []
        while len(steps) < count and not generator.is_done():
            generator.generate_next_token()
            steps.append([int(token) for token in generator.get_next_tokens()])
        template = {}
        if "chat" in job:
            template = {"text": og.Tokenizer(model).apply_chat_template(json.dumps(job["chat"]))}
        return {"tokens": [list(row) for row in zip(*steps, strict=True)], **template}
    except Exception as error:  # noqa: BLE001  # whatever it raises is the finding
        return {"error": str(error)}


print(json.dumps([run(job) for job in json.load(sys.stdin)]))
