"""onnxruntime-genai: `genai_arm.py FOLDER THREADS`, FOLDER made by its model builder; see talk.py."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai
from talk import serve

config = Path(sys.argv[1], "genai_config.json")
facts = json.loads(config.read_text())
facts["model"]["decoder"]["session_options"]["intra_op_num_threads"] = int(sys.argv[2])
config.write_text(json.dumps(facts))
model = onnxruntime_genai.Model(sys.argv[1])


def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
    settings = onnxruntime_genai.GeneratorParams(model)
    length = len(prompts[0])
    # a least length, so that no text ends before the others
    settings.set_search_options(batch_size=len(prompts), max_length=length + count, min_length=length + count,
                                do_sample=False)  # fmt: skip
    generator = onnxruntime_genai.Generator(model, settings)
    generator.append_tokens(np.array(prompts, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[length:].tolist() for row in range(len(prompts))]


serve(generate)
