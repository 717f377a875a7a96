"""HQQ, which needs no text. Settings: `bits`, `group`."""

import torch
from protocol import Job, load, serve, versions


def work(job: Job) -> dict[str, object]:
    from hqq.core.quantize import HQQLinear, hqq_base_quant_config
    from hqq.models.hf.base import AutoHQQHFModel
    from safetensors.torch import save_file

    model = load(job)
    recipe = hqq_base_quant_config(nbits=job.settings["bits"], group_size=job.settings["group"])
    with job.timed():
        AutoHQQHFModel.quantize_model(model, quant_config=recipe, compute_dtype=torch.bfloat16, device="cpu")
        # As its own save_to_safetensors, which stops at a head that is tied.
        tied = model.config.tie_word_embeddings
        state = {name: value.contiguous() for name, value in model.state_dict().items()
                 if not (tied and name == "lm_head.weight")}  # fmt: skip
        save_file(state, job.artefact / "model.safetensors")
    found = {f"{name}.weight": module.dequantize() for name, module in model.named_modules()
             if isinstance(module, HQQLinear)}  # fmt: skip
    job.keep(found)
    job.check(model)
    return {"versions": versions("hqq", "torch", "transformers")}


serve(work)
