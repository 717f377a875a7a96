"""NVIDIA ModelOpt. Settings: `config`, a name of its PTQ settings; or `effective_bits` and `formats`, for its search.

Its checkpoints hold packed weights for a GPU alone; what they take is counted: codes of each layer's bits, an fp16
scale a block (or row), and AWQ's scale of every input column.
"""

from typing import Any

import torch
from protocol import Job, layers, load, serve, versions


def work(job: Job) -> dict[str, object]:
    import modelopt.torch.quantization as mtq

    model = load(job, "float32")
    rows = torch.from_numpy(job.rows())

    def calibrate(model: Any) -> None:
        with torch.no_grad():
            for row in rows:
                model(input_ids=row[None])

    with job.timed():
        if "config" in job.settings:
            model = mtq.quantize(model, getattr(mtq, job.settings["config"]), calibrate)
        else:
            batches = [{"input_ids": row[None], "labels": row[None]} for row in rows]
            model, _ = mtq.auto_quantize(
                model, constraints={"effective_bits": job.settings["effective_bits"]},
                quantization_formats=[getattr(mtq, name) for name in job.settings["formats"]],
                data_loader=batches, forward_step=lambda model, batch: model(**batch),
                loss_func=lambda output, _: output.loss, num_calib_steps=len(batches),
                num_score_steps=len(batches), disabled_layers=["*lm_head*"])  # fmt: skip
        size = sum(bytes_of(module) for module in layers(model).values())
    job.check(model)
    mtq.fold_weight(model)
    job.keep({f"{name}.weight": effective(module) for name, module in layers(model).items()})
    return {"versions": versions("nvidia-modelopt", "torch", "transformers"), "linear_bytes": size}


def bytes_of(layer: Any) -> int:
    """What a layer takes as a checkpoint would hold it."""
    quantizer, weight = layer.weight_quantizer, layer.weight
    if not quantizer.is_enabled:
        return weight.numel() * 2
    rows, columns = weight.shape
    block = (quantizer.block_sizes or {}).get(-1, columns)
    scaled = getattr(layer.input_quantizer, "pre_quant_scale", None) is not None
    return int(weight.numel() * quantizer.num_bits // 8 + rows * -(-columns // block) * 2 + columns * 2 * scaled)


def effective(layer: Any) -> torch.Tensor:
    """The weight that gives the layer's output from its input as it comes: AWQ scales the input before."""
    scale = getattr(layer.input_quantizer, "pre_quant_scale", None)
    return layer.weight if scale is None else layer.weight * scale


serve(work)
